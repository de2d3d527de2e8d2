"""A checkpoint of LeRobot as what a policy server serves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lerobot.configs import PreTrainedConfig
from lerobot.policies import get_policy_class, make_pre_post_processors
from lerobot.utils.constants import OBS_STATE
from torch import Tensor

from pronghorn.vlash.chunks import ChunkRequest, Observation, Policy
from pronghorn.vlash.lerobot.configuration_vlash import VLASHConfig  # noqa: F401 - makes the type known
from pronghorn.vlash.lerobot.policy_chunks import PolicyChunks, Seen
from pronghorn.vlash.lerobot.runner import settings_for
from pronghorn.vlash.remote import Description


def load_served(
    path: str, device: str, mode: str | None = None, rename_map: dict[str, str] | None = None, **settings: Any
) -> tuple[Policy, Description]:
    """A policy and what it is.

    The observations that it takes are LeRobot's: of one robot (state [state_dim]) frames as `build_dataset_frame` gives
    them, of several (state [batch, state_dim]) batches; with the task as text.

    Args:
        path: a folder with a checkpoint, or a repository of the Hub.
        device: where it computes.
        mode: `VLASHSettings.async_mode`; None as it was configured.
        rename_map: the robot's names of cameras to the policy's.
        settings: others of `VLASHSettings` that the edge is to begin with.

    Raises:
        ValueError: the policy predicts no chunks from one observation, takes no state, or the mode does not fit.
    """
    config = PreTrainedConfig.from_pretrained(path)
    config.device = device
    chosen = settings_for(config, async_mode=mode, **settings)
    if config.robot_state_feature is None or config.action_feature is None:
        raise ValueError(f"policy: got {path}, which takes no state; wanted one with a state and an action")
    names = {new: old for old, new in (rename_map or {}).items()}
    cameras = tuple(names.get(name, name) for name in config.image_features)
    sizes = config.robot_state_feature.shape[0], config.action_feature.shape[0]
    description = Description(path, chosen, *sizes, inputs=cameras)
    policy = get_policy_class(config.type).from_pretrained(path, config=config).to(device).eval()
    overrides: dict[str, Any] = {"device_processor": {"device": device}}
    if rename_map:
        overrides["rename_observations_processor"] = {"rename_map": rename_map}
    before, after = make_pre_post_processors(config, pretrained_path=path, preprocessor_overrides=overrides)
    chunks = PolicyChunks(policy, before, after, chosen)
    if chunks.history_steps:
        raise ValueError(f"policy: got {path}, which looks at several observations; requests carry one")

    def serve(request: ChunkRequest) -> Tensor:
        seen = request.observation
        content = Seen(({OBS_STATE: seen.state, **seen.content},))
        return chunks(replace(request, observation=Observation(content, seen.state)))

    return serve, description
