"""A checkpoint of LeRobot with an observation that fits it, to be timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies import get_policy_class, make_pre_post_processors
from torch import Tensor

from pronghorn.vlash.lerobot.configuration_vlash import VLASHConfig


def policy_with_example(path: str, device: str) -> tuple[Callable[[dict[str, Any]], Tensor], dict[str, Any]]:
    """What predicts a chunk, a method of the policy, and a batch of one random observation that it takes.

    Args:
        path: a folder with a checkpoint, or a repository of the Hub.
        device: where it computes.

    Raises:
        ValueError: the policy looks at several observations; as a policy of type `vlash` it can be timed too.
    """
    config = PreTrainedConfig.from_pretrained(path)
    config.device = device
    if config.n_obs_steps > 1 and not isinstance(config, VLASHConfig):
        raise ValueError(f"policy: got {path}, which looks at {config.n_obs_steps} observations, wanted one")
    policy = get_policy_class(config.type).from_pretrained(path, config=config).to(device).eval()
    overrides = {"device_processor": {"device": device}}
    before, _ = make_pre_post_processors(config, pretrained_path=path, preprocessor_overrides=overrides)
    random = {name: torch.rand(1, *feature.shape) for name, feature in config.input_features.items()}
    return policy.predict_action_chunk, before({**random, "task": ["pick up the cube"]})
