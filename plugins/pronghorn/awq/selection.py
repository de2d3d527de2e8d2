"""Which linears of a decoder block are quantized."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def quantizable_linears(
    block: nn.Module, modules_to_not_convert: Sequence[str] | None = None, *, prefix: str = ""
) -> dict[str, nn.Linear]:
    """The `nn.Linear`s of `block` that AWQ quantizes, by their name inside the block, in definition order.

    Left in 16 bits are linears whose full name (`prefix`.name) contains an entry of `modules_to_not_convert` as whole
    components ("gate" is not in "mlp.gate_proj", "mlp" is), and the routers and gates of mixtures of experts: they
    are tiny, and an error in them sends tokens to the wrong expert.
    """
    skipped = tuple(modules_to_not_convert or ())
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
        and not is_router(name)
        and not any(f".{entry}." in f".{prefix}.{name}." for entry in skipped)
    }


def is_router(name: str) -> bool:
    """Whether a linear's name says that it routes tokens to experts (`gate`, `router`, `shared_expert_gate`)."""
    leaf = name.rsplit(".", 1)[-1]
    return leaf in ("gate", "router", "wg") or leaf.endswith("_gate") or "router" in name.split(".")
