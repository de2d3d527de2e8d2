"""Names of weights: those of the authors' checkpoints, and those of LeRobot's with and without `model.` before them."""

from __future__ import annotations

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
    for theirs, ours in BEGINNINGS:
        if name.startswith(ours):
            return (LEROBOT_PREFIX if prefixed else "") + theirs + name.removeprefix(ours)
    raise ValueError(f"name: got {name!r}, wanted a weight of the authors' pi0 or pi0.5")
