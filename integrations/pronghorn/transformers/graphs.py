"""A language model's forward as CUDA graphs, where it writes to a static cache: one launch instead of a thousand."""

from __future__ import annotations

import copy
import functools
import logging
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from pronghorn.kernels.cache_write import cache_write
from pronghorn.transformers.attention import ATTENTION

logger = logging.getLogger(__name__)

SMALLEST_CHUNK, LARGEST_CHUNK = 16, 512  # tokens; prompts are run in powers of two
# Longer prompts on an empty cache run as they are: the GPU is busy enough then, and attention needs no mask.
LONGEST_IN_CHUNKS = 2 * LARGEST_CHUNK
OPTIONS = {"use_cache": True, "return_dict": True, "logits_to_keep": 1}  # what `generate` asks for


class GraphedForward:
    """Replaces a causal language model's `forward` while it is installed.

    Steps of `generate` with a static cache are captured as CUDA graphs at their first use and replayed from then on:
    one token, or a chunk of a prompt, which is filled up to a power of two. A static cache of the same size that comes
    later takes over the memory of one that has gone, and its graphs. Whatever else the model is called with runs as
    before, and so does everything if a step cannot be captured; a warning says why.

    Args:
        model: on one CUDA device, with the attention "sdpa", for which "pronghorn_cached" stands in.
        compile: let `torch.compile` fuse the small operations of a step before it is captured, once for one token and
            once for chunks.
    """

    def __init__(self, model: PreTrainedModel, *, compile: bool = False) -> None:
        self.model = model
        self._eager: Callable[..., Any] = model.forward
        self._captured: Callable[..., Any] = torch.compile(self._eager, dynamic=True) if compile else self._eager
        self._attention = model.config._attn_implementation
        self._states: weakref.WeakKeyDictionary[StaticCache, _State] = weakref.WeakKeyDictionary()
        self._released: _State | None = None
        self._refused = False

    def install(self) -> None:
        """Put it in the place of the model's `forward`."""

        @functools.wraps(self._eager)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._run(**kwargs) if not args and self._takes(kwargs) else self._eager(*args, **kwargs)

        self.model.forward = forward
        self.model.set_attn_implementation(ATTENTION)

    def remove(self) -> None:
        """Give the model its own `forward` back, and free the graphs."""
        self.model.__dict__.pop("forward", None)
        self.model.set_attn_implementation(self._attention)
        self._states.clear()
        self._released = None

    def _takes(self, kwargs: dict[str, Any]) -> bool:
        if self._refused or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return False
        given = {name: value for name, value in kwargs.items() if value is not None}
        ids, cache, mask = (given.pop(name, None) for name in ("input_ids", "past_key_values", "attention_mask"))
        given.pop("position_ids", None)
        return (
            given == OPTIONS
            and isinstance(ids, Tensor)
            and isinstance(cache, StaticCache)
            and all(type(layer) is StaticLayer for layer in cache.layers)
            and (mask is None or (isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype == torch.bool))
        )

    def _run(
        self,
        input_ids: Tensor,
        past_key_values: StaticCache,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **options: Any,
    ) -> Any:
        cache, (batch, tokens) = past_key_values, input_ids.shape
        state = self._states.get(cache) or self._taken_over(cache, batch)
        length: Any = cache.layers[0].cumulative_length
        filled = 0 if state is None or tokens == 1 else int(length)  # reading it waits for the GPU
        if state is None or (tokens > LONGEST_IN_CHUNKS and not filled):
            return self._eager(
                input_ids=input_ids, past_key_values=cache, attention_mask=attention_mask, position_ids=position_ids,
                **options,
            )  # fmt: skip
        positions = length + torch.arange(tokens, device=input_ids.device)
        if position_ids is None:
            position_ids = positions.expand(batch, -1)
        if attention_mask is None:
            slots = torch.arange(state.capacity, device=input_ids.device)
            attention_mask = (slots <= positions[:, None]).expand(batch, 1, -1, -1)
        logits: Any = None
        for start in range(0, tokens, LARGEST_CHUNK):
            ids, mask, at = input_ids[:, start:], attention_mask[:, :, start:], position_ids[:, start:]
            chunk = min(LARGEST_CHUNK, tokens - start)
            graph = self._graph(state, cache, chunk, filled + start)
            if graph is None:
                rest = {"input_ids": ids, "attention_mask": mask, "position_ids": at}
                return self._eager(**rest, past_key_values=cache, **options)
            logits = graph.replay(ids[:, :chunk], mask[:, :, :chunk], at[:, :chunk])
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _taken_over(self, cache: StaticCache, batch: int) -> _State | None:
        """The state of a cache seen for the first time; None where it has no memory yet, and none is left for it."""
        first, released = cache.layers[0], self._released
        if first.is_initialized:
            return self._keep(cache, _State(cache))
        if released is None or (released.batch, released.capacity) != (batch, first.max_cache_len):
            return None
        self._released = None
        cache.layers[:] = released.layers
        for layer in released.layers:
            layer.cumulative_length.zero_()
        return self._keep(cache, released)

    def _keep(self, cache: StaticCache, state: _State) -> _State:
        self._states[cache] = state
        weakref.finalize(cache, setattr, self, "_released", state).atexit = False
        return state

    def _graph(self, state: _State, cache: StaticCache, tokens: int, filled: int) -> _Graph | None:
        """The graph that takes so many tokens; None where none can be captured."""
        if not state.holds(cache):  # as after beam search, which exchanges a cache's memory
            return None
        size = 1 if tokens == 1 else max(SMALLEST_CHUNK, 1 << (tokens - 1).bit_length())
        if tokens > 1 and filled + size > state.capacity:
            size = tokens  # there is no room to fill up
        if size not in state.graphs:
            try:
                state.graphs[size] = _Graph(self._captured, state, cache, size)
            except RuntimeError as error:
                if "captur" not in str(error):
                    raise
                self._refused = True
                logger.warning("%s runs without CUDA graphs: %s", type(self.model).__name__, error)
                return None
        return state.graphs[size]


class _State:
    """The memory of a static cache and the graphs that write to it."""

    def __init__(self, cache: StaticCache) -> None:
        self.layers: list[Any] = list(cache.layers)
        self.batch, self.capacity = self.layers[0].keys.shape[0], self.layers[0].max_cache_len
        self.graphs: dict[int, _Graph] = {}
        self._tensors = [(layer.keys, layer.values, layer.cumulative_length) for layer in self.layers]

    def holds(self, cache: StaticCache) -> bool:
        """Whether the cache still has this memory."""
        return all(
            layer.keys is keys and layer.values is values and layer.cumulative_length is length
            for layer, (keys, values, length) in zip(cache.layers, self._tensors, strict=True)
        )


class _Written(StaticLayer):
    """A layer's memory, to which tokens are written by one kernel, in slots that all layers share.

    It counts no tokens: the graph does, once all layers are through.
    """

    def __init__(self, layer: StaticLayer, slots: Tensor) -> None:
        vars(self).update(vars(layer))
        self._slots = slots

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens; what the cache holds."""
        key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (key_states, value_states))
        keys, values = cast("tuple[Tensor, Tensor]", (self.keys, self.values))
        cache_write(key, value, keys, values, self._slots)
        return keys, values


class _Graph:
    """`size` tokens for one cache. Inputs have fixed places, and so have the logits of the last token."""

    def __init__(self, forward: Callable[..., Any], state: _State, cache: StaticCache, size: int) -> None:
        lengths = [layer.cumulative_length for layer in state.layers]
        device = lengths[0].device
        self.size = size
        self.ids = torch.zeros(state.batch, size, dtype=torch.long, device=device)
        self.positions = torch.zeros_like(self.ids)
        self.mask = torch.ones(state.batch, 1, size, state.capacity, dtype=torch.bool, device=device)
        self.last = torch.full((1,), size - 1, device=device)
        self.count = torch.full((), size, device=device)
        first_slots = torch.arange(state.batch, device=device)[:, None] * state.capacity
        offsets = (first_slots + torch.arange(size, device=device)).flatten()
        slots = torch.empty_like(offsets)
        self._read = offsets, slots  # by the graph, which does not keep them alive
        cache = copy.copy(cache)
        cache.layers = [_Written(layer, slots) for layer in state.layers]

        def run() -> Tensor:
            torch.add(offsets, lengths[0], out=slots)
            logits: Tensor = forward(
                input_ids=self.ids, attention_mask=self.mask, position_ids=self.positions, past_key_values=cache,
                use_cache=True, return_dict=True, logits_to_keep=self.last,
            ).logits  # fmt: skip
            torch._foreach_add_(lengths, [self.count] * len(lengths))
            return logits

        before = [length.clone() for length in lengths]

        def restore() -> None:
            torch._foreach_copy_(lengths, before)

        self.logits, self._replay = captured(run, restore)

    def replay(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Logits [batch, 1, vocabulary] after up to `size` tokens."""
        tokens = ids.shape[1]
        self.ids[:, :tokens].copy_(ids)
        self.mask[:, :, :tokens].copy_(mask)
        self.positions[:, :tokens].copy_(positions)
        if self.size > 1:
            # What fills up sees what the last token sees: its values must be finite, even if nothing attends to them.
            self.mask[:, :, tokens:].copy_(mask[:, :, -1:])
            self.positions[:, tokens:].copy_(positions[:, -1:])
            self.last.fill_(tokens - 1)
            self.count.fill_(tokens)
        self._replay()
        return self.logits.clone()


def captured(run: Callable[[], Tensor], restore: Callable[[], None]) -> tuple[Tensor, Callable[[], None]]:
    """The place of a function's result, and what computes it anew; `restore` undoes what a run did."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # libraries set themselves up, which a graph cannot record
        restore()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return result, graph.replay
