"""Names of weights: those of the authors' checkpoints, and those of LeRobot's with and without `model.` before them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from pronghorn.vlash.pi.fusion import unfuse_state_dict

LEROBOT_PREFIX = "model."
SUFFIX = (
    "action_in_proj", "time_mlp_in", "time_mlp_out", "state_proj", "state_mlp_in", "state_mlp_out",
    "action_time_mlp_in", "action_time_mlp_out", "delay_embedding",
)  # fmt: skip
# Each as LeRobot's beginning of a name, without `model.`, and the authors'.
BEGINNINGS = (
    *((f"{name}.", f"model.suffix_embedder.{name}.") for name in SUFFIX),
    ("action_out_proj.", "model.action_out_proj."),
    ("paligemma_with_expert.paligemma.", "model.vlm."),
    ("paligemma_with_expert.gemma_expert.", "model.action_expert."),
)
# Of these, such that no checkpoint of LeRobot's has them.
AUTHORS = ("model.suffix_embedder.", "model.vlm.", "model.action_expert.")
# The authors' modules are reachable by two names each, and safetensors keep one: these, of some.
LAYER, EXPERTS = r"model\.layers\.(\d+)\.", {"vlm": "vlm.model.language_model", "action_expert": "action_expert.model"}
ALIASES = [
    *((re.compile(rf"{LAYER}self_attn\.{name}_attention\."), rf"model.{owner}.layers.\1.self_attn.")
      for name, owner in EXPERTS.items()),
    *((re.compile(rf"{LAYER}mlp\.{name}_mlp\."), rf"model.{owner}.layers.\1.mlp.") for name, owner in EXPERTS.items()),
    (re.compile(r"model\.prefix_embedder\.lang_embedder\."), "model.vlm.model.language_model.embed_tokens."),
]  # fmt: skip
ROTATION = re.compile(rf"{LAYER}self_attn\.rotary_emb\.")  # computed, not learnt
# The authors' policies normalise by themselves, and keep the statistics among their weights.
NORMALIZERS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")
STATISTIC = re.compile(r"(?:normalize_inputs|unnormalize_outputs)\.buffer_(\w+)\.(\w+)")
FEATURES = {"observation_state": "observation.state", "action": "action"}


def vlash_name(name: str) -> str:
    """The authors' name of a weight of LeRobot's, with or without `model.` before it.

    Raises:
        ValueError: no such weight is known.
    """
    bare = name.removeprefix(LEROBOT_PREFIX)
    for theirs, ours in BEGINNINGS:
        if bare.startswith(theirs):
            return ours + bare.removeprefix(theirs)
    raise ValueError(f"name: got {name!r}, wanted a weight of LeRobot's pi0 or pi0.5")


def lerobot_name(name: str, *, prefixed: bool = True) -> str:
    """LeRobot's name of a weight that has the authors' name.

    Args:
        name: the authors'.
        prefixed: with `model.` before it, as policies that LeRobot saved have it; the published bases have not.

    Raises:
        ValueError: no such weight is known.
    """
    for pattern, plain in ALIASES:
        name = pattern.sub(plain, name)
    for theirs, ours in BEGINNINGS:
        if name.startswith(ours):
            return (LEROBOT_PREFIX if prefixed else "") + theirs + name.removeprefix(ours)
    raise ValueError(f"name: got {name!r}, wanted a weight of the authors' pi0 or pi0.5")


def is_authors(names: Iterable[str]) -> bool:
    """Whether these are names of a checkpoint of the authors' code, rather than of LeRobot's."""
    return any(name.startswith(AUTHORS) for name in names)


def lerobot_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a checkpoint of the authors' code under LeRobot's names, without `model.` before them.

    Joined projections are split; statistics of normalisation (see `normalization_statistics`) are left out.

    Raises:
        ValueError: a name is unknown, or two are of the same weight.
    """
    named: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name.startswith(NORMALIZERS) or ROTATION.match(name):
            continue
        there = lerobot_name(name, prefixed=False)
        if there in named:
            raise ValueError(f"weights: got {name}, and the same weight under another name")
        named[there] = weight
    for owner in ("paligemma_with_expert.paligemma", "paligemma_with_expert.gemma_expert"):
        language = "model.language_model." if owner.endswith("paligemma") else "model."
        words, head = f"{owner}.{language}embed_tokens.weight", f"{owner}.lm_head.weight"
        if words in named:
            named.setdefault(head, named[words])  # one weight there, of which safetensors keep one name
        if owner.endswith("gemma_expert"):
            named.pop(words, None)  # LeRobot's expert for actions reads no text
    return unfuse_state_dict(named)


def normalization_statistics(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The statistics that a checkpoint of the authors' code holds: of the state and of actions, as LeRobot names them.

    Raises:
        ValueError: one is not finite, as in a policy that never saw a data set.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        match = STATISTIC.fullmatch(name)
        if match is None or match[1] not in FEATURES:
            continue
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name}: not finite; the checkpoint was saved without the statistics of a data set")
        found.setdefault(FEATURES[match[1]], {})[match[2]] = value
    return found
