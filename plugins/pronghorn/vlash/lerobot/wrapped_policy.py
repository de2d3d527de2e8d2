"""The policy inside: made by LeRobot's own classes, with a checkpoint's weights where there is one."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from lerobot.configs import PreTrainedConfig
from lerobot.policies import PreTrainedPolicy, get_policy_class
from lerobot.utils.constants import ACTION
from torch import Tensor

from pronghorn.files.tensor_files import read_tensors
from pronghorn.vlash.pi.keys import is_authors, lerobot_weights
from pronghorn.vlash.pi.suffix import add_state_condition, has_state_condition

WEIGHTS = "model.safetensors"
PREFIX = "model."
# pi0.5's way in for a projected state; a pi0 has the first of them for its token.
STATE_CONDITION = ("state_proj.", "state_mlp_in.", "state_mlp_out.")


def tell_of_dataset(config: Any, meta: Any) -> None:
    """Tell a policy's configuration what LeRobot's `make_policy` tells the one that it knows of."""
    names = meta.features.get(ACTION, {}).get("names")
    if hasattr(config, "action_feature_names") and names is not None:
        config.action_feature_names = list(names)
    if hasattr(config, "set_dataset_feature_metadata"):
        config.set_dataset_feature_metadata(meta.features)
    config._runtime_dataset_meta = meta


def build_policy(
    config: PreTrainedConfig, stats: dict[str, Any] | None, meta: Any, weights: str | None
) -> PreTrainedPolicy:
    """A LeRobot policy.

    Args:
        config: its configuration.
        stats: the data set's statistics, for policies that take them.
        meta: the data set's metadata.
        weights: a folder or repository with a checkpoint.

    Raises:
        ValueError: the checkpoint lacks weights or has others.
    """
    known = {name: value for name, value in (("dataset_stats", stats), ("dataset_meta", meta)) if value is not None}
    policy = get_policy_class(config.type)(config=config, **known)
    if weights is not None:
        load_weights(policy, weights)
    return policy.to(config.device)


def load_weights(policy: PreTrainedPolicy, path: str) -> None:
    """Load a checkpoint.

    Its names may begin with "model." (as LeRobot saves) or not (as pi0's and pi0.5's authors), or be those of VLASH's
    authors, with projections joined or not. A pi0.5 whose checkpoint has a projected state gets the layers for it.

    LeRobot's own loader of pi0 and pi0.5 leaves random weights where something goes wrong; this one raises.

    Raises:
        FileNotFoundError: there is no `model.safetensors`.
        ValueError: weights are missing, unknown, or have other shapes.
    """
    local = Path(path)
    file = local / WEIGHTS if local.is_dir() else Path(hf_hub_download(path, WEIGHTS))
    if not file.is_file():
        raise FileNotFoundError(f"base_path: there is no {WEIGHTS} in {path}")
    load_state(policy, _named_alike(policy, read_tensors(file)), path)


def load_state(policy: PreTrainedPolicy, given: dict[str, Tensor], path: str, optional: Collection[str] = ()) -> None:
    """Load weights, all of them.

    Args:
        policy: gets them.
        given: names to weights.
        path: where they are from.
        optional: names that may be missing.

    Raises:
        ValueError: weights are missing, unknown, or have other shapes.
    """
    own = policy.state_dict()
    shapes = [
        f"{name} {list(given[name].shape)} for {list(value.shape)}"
        for name, value in own.items()
        if name in given and given[name].shape != value.shape
    ]
    missing = [name for name in _missing(own, given) if name not in optional]
    unknown = sorted(set(given) - set(own))
    if shapes or missing or unknown:
        raise ValueError(
            f"the weights in {path} do not fit: {len(missing)} are missing ({_some(missing)}), {len(unknown)} are "
            f"unknown ({_some(unknown)}), {len(shapes)} have other shapes ({_some(shapes)})"
        )
    poisoned = [name for name, value in given.items() if not bool(value.isfinite().all())]
    if poisoned:
        raise ValueError(f"the weights in {path} hold NaN or Inf: {_some(poisoned)}")
    policy.load_state_dict(given, strict=False)


def _named_alike(policy: PreTrainedPolicy, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    if not hasattr(policy, "_fix_pytorch_state_dict_keys"):
        return weights
    if is_authors(weights):
        bare = lerobot_weights(weights)
    else:
        bare = {name.removeprefix(PREFIX): value for name, value in weights.items()}
    # LeRobot's pi0.5 knows of no projected state, and would leave it out.
    condition: dict[str, Tensor] = {}
    if "state_mlp_in.weight" in bare:
        condition = {name: bare.pop(name) for name in list(bare) if name.startswith(STATE_CONDITION)}
        if not has_state_condition(policy.model):
            add_state_condition(policy.model, policy.config.max_state_dim)
    fixed = {**policy._fix_pytorch_state_dict_keys(bare, policy.config), **condition}
    return {name if name.startswith(PREFIX) else PREFIX + name: value for name, value in fixed.items()}


def _missing(own: dict[str, Tensor], given: dict[str, Tensor]) -> list[str]:
    """Names without a weight, save those that share their storage with one that has."""
    loaded = {own[name].data_ptr() for name in given if name in own}
    return sorted(name for name, value in own.items() if name not in given and value.data_ptr() not in loaded)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
