"""Run a packed model fast: linears that read the same input become one, in the layout that is multiplied fastest."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pronghorn.awq.layers import AwqLinear
from pronghorn.kernels.dequantize_weight.layouts import pack, pack_codes, unpack_codes
from pronghorn.kernels.w4a16_matmul import preferred_layout, w4a16_matmul
from pronghorn.transformers.fused_operations import FusedOperations


class Fused:
    """A model in its fast form; `restore` (or the end of a `with` block) gives the old one back, bit for bit."""

    def __init__(self, model: PreTrainedModel, example: Tensor, compile: bool = False) -> None:
        self.model = model
        self._linears: list[tuple[SharedInput, list[str], list[AwqLinear]]] = []
        self._operations: Any = None
        self._graphs: Any = None
        self._cache = model.generation_config.cache_implementation if model.can_generate() else None
        groups = shared_inputs(model, example)
        object.__setattr__(model, "awq_fused", self)
        try:
            self._fuse(groups)
            self._operations = FusedOperations(model)
        except BaseException:  # out of memory, say: what was fused comes back
            self.restore()
            raise
        if _graphable(model):
            self._install_graphs(compile)

    def _install_graphs(self, compile: bool) -> None:
        from pronghorn.transformers.graphs import GraphedForward

        self._graphs = GraphedForward(self.model, compile=compile)
        self._graphs.install()
        model: Any = self.model
        options, generate = model.generation_config, model.generate
        options.cache_implementation = options.cache_implementation or "static"

        @functools.wraps(generate)
        def generate_with_own_cache(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("past_key_values") is None:
                return generate(*args, **kwargs)
            asked, options.cache_implementation = options.cache_implementation, None  # transformers takes one alone
            try:
                return generate(*args, **kwargs)
            finally:
                options.cache_implementation = asked

        model.generate = generate_with_own_cache

    def _fuse(self, groups: list[list[str]]) -> None:
        modules = dict(self.model.named_modules())
        for names in groups:
            members = [modules[name] for name in names]
            shared = SharedInput(members)
            self._linears.append((shared, names, members))
            for index, (name, member) in enumerate(zip(names, members, strict=True)):
                self.model.set_submodule(name, Output(shared, index))
                member.qweight = member.qweight.to("meta")  # one copy of the codes is enough

    def restore(self) -> None:
        """Put the checkpoint's own linears back."""
        for shared, names, members in self._linears:
            for name, member, qweight in zip(names, members, shared.separate(members), strict=True):
                member.qweight = qweight
                self.model.set_submodule(name, member)
        self._linears = []
        if self._operations is not None:
            self._operations.restore()
        if self._graphs is not None:
            self._graphs.remove()
            vars(self.model).pop("generate")
            self.model.generation_config.cache_implementation = self._cache
        del self.model.awq_fused

    def __enter__(self) -> Fused:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()


def _graphable(model: PreTrainedModel) -> bool:
    """Whether the model decodes into a static cache on one GPU, with an attention that takes its mask."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    return (
        model.can_generate()
        and bool(getattr(model, "_can_compile_fullgraph", False))
        and getattr(model.config, "_attn_implementation", None) == "sdpa"
        and len(devices) == 1
        and devices.pop().type == "cuda"
    )


def fuse(model: PreTrainedModel, *, example: Tensor | None = None, compile: bool = False) -> Fused:
    """Bring a model with packed linears into its fast form, in place.

    Linears that are given the same tensor (queries, keys and values; gate and up) become one matmul. Which they are
    is seen in a run of one token, not known by name. RMS norms and rotary embeddings, known by what they compute,
    become one kernel each. On a Hopper GPU codes are put into the order of the tensor cores. On any one GPU, `generate`
    uses a static cache where the model allows it, and its steps are CUDA graphs: captured at their first use, without a
    compiler. A fused model is not saved: restore it first.

    Args:
        model: with `AwqLinear`s.
        example: token ids [1, length] that every packed linear sees; by default one token.
        compile: let `torch.compile` fuse what is between the linears, for the CUDA graphs; their first use then takes
            tens of seconds for a large model.

    Returns:
        The fused model's handle, also a context manager.

    Raises:
        ValueError: no packed linears, or fused already.

    Examples:
        >>> with fuse(model):
        ...     model.generate(**inputs)

    Source: Lin et al. (arXiv 2306.00978), section 4.2 (kernel fusion).
    """
    if hasattr(model, "awq_fused"):
        raise ValueError("model: fused already")
    if not any(isinstance(module, AwqLinear) for module in model.modules()):
        raise ValueError("model: has no packed linears; load or quantize one with AwqConfig")
    if example is None:
        example = torch.zeros(1, 1, dtype=torch.long)
    return Fused(model, example.to(model.device), compile)


@torch.no_grad()
def shared_inputs(model: PreTrainedModel, example: Tensor) -> list[list[str]]:
    """Names of the packed linears, those that read the same tensor together, in the order in which they run.

    Experts that the example does not reach stay by themselves.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    inputs: list[Tensor] = []  # kept alive: ids are not given out twice

    def record(name: str, module: AwqLinear, x: Tensor) -> None:
        inputs.append(x)
        form = (module.bits, module.group_size, module.scales.dtype, module.bias is None, module.qweight.device)
        members = groups.setdefault((id(x), x._version, *form), [])
        if name not in members:
            members.append(name)

    packed = {name: module for name, module in model.named_modules() if isinstance(module, AwqLinear)}
    with _hooked(packed, record):
        model(input_ids=example, use_cache=False)
    seen = [names for names in groups.values() if not set(names) & _repeated(groups)]
    alone = set(packed) - {name for names in seen for name in names}
    return [*seen, *([name] for name in packed if name in alone)]


def _repeated(groups: dict[tuple[Any, ...], list[str]]) -> set[str]:
    """Linears that ran more than once, on different inputs: layers that share weights."""
    names = [name for members in groups.values() for name in members]
    return {name for name in names if names.count(name) > 1}


@contextmanager
def _hooked(packed: dict[str, AwqLinear], record: Any) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: record(name, module, args[0]))
        for name, module in packed.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class SharedInput(nn.Module):
    """Packed linears that read the same input, as one."""

    qweight: Tensor
    scales: Tensor
    qzeros: Tensor
    bias: Tensor | None

    def __init__(self, members: list[AwqLinear]) -> None:
        super().__init__()
        first = members[0]
        self.sizes = [member.out_features for member in members]
        self.bits, self.in_features = first.bits, first.in_features
        self.group_size = first.in_features if first.group_size == -1 else first.group_size
        self.out_features = sum(self.sizes)
        codes, scales, zeros = (torch.cat(parts) for parts in zip(*(member.codes() for member in members), strict=True))
        self.layout = preferred_layout(
            "natural", bits=self.bits, group_size=self.group_size, out_features=self.out_features,
            in_features=self.in_features, dtype=scales.dtype, device=scales.device,
        )  # fmt: skip
        packed = pack(codes, scales, zeros, layout=self.layout, bits=self.bits, group_size=self.group_size)
        for name, tensor in packed.items():
            self.register_buffer(name, tensor)
        biases = [member.bias for member in members if member.bias is not None]  # all have one, or none
        self.register_buffer("bias", torch.cat(biases) if biases else None)
        self._input: Tensor | None = None
        self._outputs: tuple[Tensor, ...] = ()

    def output(self, x: Tensor, index: int) -> Tensor:
        """[..., K] to the output [..., N] of one linear; the others' are kept until the last has been asked for."""
        if self._input is not x:
            together = w4a16_matmul(
                x, self.qweight, self.scales, self.qzeros, layout=self.layout, bits=self.bits,
                group_size=self.group_size, out_features=self.out_features, bias=self.bias,
            )  # fmt: skip
            self._input, self._outputs = x, together.split(self.sizes, dim=-1)
        result = self._outputs[index]
        if index == len(self.sizes) - 1:
            self._input, self._outputs = None, ()
        return result

    def separate(self, members: list[AwqLinear]) -> Iterator[Tensor]:
        """The codes of each linear in its own layout."""
        codes = unpack_codes(
            self.qweight,
            layout=self.layout,
            bits=self.bits,
            out_features=self.out_features,
            in_features=self.in_features,
        )
        for member, own in zip(members, codes.split(self.sizes), strict=True):
            yield pack_codes(own, layout=member.layout, bits=self.bits)


class Output(nn.Module):
    """Stands where one of the linears stood."""

    def __init__(self, shared: SharedInput, index: int) -> None:
        super().__init__()
        self._shared = (shared,)  # not a submodule of each: the first one's
        if index == 0:
            self.shared = shared
        self.index = index
        self.in_features, self.out_features = shared.in_features, shared.sizes[index]

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N], in the dtype of `x`."""
        return self._shared[0].output(x, self.index)
