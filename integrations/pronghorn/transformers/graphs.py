"""A language model's forward as CUDA graphs, where it writes to a static cache: one launch instead of a thousand."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import weakref
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from pronghorn.kernels.cache_write import cache_write
from pronghorn.transformers.attention import ATTENTION

logger = logging.getLogger(__name__)

SMALLEST_CHUNK, LARGEST_CHUNK = 16, 512  # tokens; prompts are run in powers of two
# Longer prompts on an empty cache run as they are: the GPU is busy enough then, and attention needs no mask.
LONGEST_IN_CHUNKS = 2 * LARGEST_CHUNK
OPTIONS = {"use_cache": True, "return_dict": True, "logits_to_keep": 1}  # what `generate` asks for


class SteppedLayer(Protocol):
    """A layer of a method's own cache, with which a step of one token can be replayed."""

    def step_memory(self) -> tuple[Tensor | None, ...] | None:
        """What a step reads and writes, and must stay where it is; None where the next step is not as later ones."""

    def for_steps(self) -> Any:
        """A stand-in with the same memory, which counts no tokens on the host."""

    def count_step(self) -> None:
        """Count a token that is replayed.

        Raises:
            ValueError: there is no room for it.
        """


class GraphedForward:
    """Replaces a causal language model's `forward` while it is installed, or within a `with` block.

    Steps of `generate` with a static cache are captured as CUDA graphs at their first use and replayed from then on:
    one token, or a chunk of a prompt, which is filled up to a power of two. A static cache of the same size that comes
    later takes over the memory of one that has gone, and its graphs. With a cache whose layers are `SteppedLayer`s,
    tokens are replayed from the second one on. Whatever else the model is called with runs as before, and so does
    everything if a step cannot be captured; a warning says why.

    Args:
        model: on one CUDA device. For the attention "sdpa" stands in "pronghorn_cached"; any other stays.
        compile: let `torch.compile` fuse the small operations of a step before it is captured, once for one token and
            once for chunks.

    Examples:
        >>> with GraphedForward(model):
        ...     model.generate(**inputs, past_key_values=duo.make_cache(static=True, max_len=4096))
    """

    def __init__(self, model: PreTrainedModel, *, compile: bool = False) -> None:
        self.model = model
        self._eager: Callable[..., Any] = model.forward
        self._captured: Callable[..., Any] = torch.compile(self._eager, dynamic=True) if compile else self._eager
        self._attention = model.config._attn_implementation
        self._states: weakref.WeakKeyDictionary[StaticCache, _State] = weakref.WeakKeyDictionary()
        self._steps: weakref.WeakKeyDictionary[Cache, _Step] = weakref.WeakKeyDictionary()
        self._released: _State | None = None
        self._refused = False

    def install(self) -> None:
        """Put it in the place of the model's `forward`."""

        @functools.wraps(self._eager)
        def forward(*args: Any, **kwargs: Any) -> Any:
            run = None if args else self._of(kwargs)
            return self._eager(*args, **kwargs) if run is None else run(**kwargs)

        cast("Any", forward).__signature__ = inspect.signature(self._eager)  # `generate` asks for it nine times a call
        self.model.forward = forward
        if self._attention == "sdpa":
            self.model.set_attn_implementation(ATTENTION)
        self._disabled = self.model.generation_config.disable_compile
        self.model.generation_config.disable_compile = True  # the graphs do it

    def remove(self) -> None:
        """Give the model its own `forward` back, and free the graphs."""
        self.model.__dict__.pop("forward", None)
        if self.model.config._attn_implementation == ATTENTION:
            self.model.set_attn_implementation(self._attention)
        self.model.generation_config.disable_compile = self._disabled
        self._states.clear()
        self._steps.clear()
        self._released = None

    def __enter__(self) -> GraphedForward:
        self.install()
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _of(self, kwargs: dict[str, Any]) -> Callable[..., Any] | None:
        """What runs a call; None where the model itself does."""
        if self._refused or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return None
        given = {name: value for name, value in kwargs.items() if value is not None}
        ids, cache, mask = (given.pop(name, None) for name in ("input_ids", "past_key_values", "attention_mask"))
        positions = given.pop("position_ids", None)
        if given != OPTIONS or not isinstance(ids, Tensor) or not isinstance(cache, Cache):
            return None
        if isinstance(cache, StaticCache) and all(type(layer) is StaticLayer for layer in cache.layers):
            fits = mask is None or (isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype == torch.bool)
            return self._run if fits else None
        stepped = all(hasattr(layer, "step_memory") for layer in cache.layers)
        return self._step if stepped and ids.shape[1] == 1 and positions is not None else None

    def _step(
        self,
        input_ids: Tensor,
        past_key_values: Cache,
        position_ids: Tensor,
        attention_mask: Any = None,
        **options: Any,
    ) -> Any:
        """One token. Where the last one found the cache's memory elsewhere, or none, it runs as it is.

        That sets up what libraries and kernels need, and after beam search, which exchanges the memory, all tokens do.
        """
        cache = past_key_values
        layers = cast("list[SteppedLayer]", cache.layers)
        memory = [layer.step_memory() for layer in layers]
        step = self._steps.get(cache)
        if step is None or not step.holds(memory):
            self._steps[cache] = _Step(memory)  # a graph of other memory goes, and frees it
            step = None
        elif not step.captured:
            step = self._capture(lambda: step.capture(self._eager, cache, input_ids, position_ids))
        if step is None:
            return self._eager(
                input_ids=input_ids, past_key_values=cache, position_ids=position_ids, attention_mask=attention_mask,
                **options,
            )  # fmt: skip
        for layer in layers:
            layer.count_step()
        logits: Any = step.replay(input_ids, position_ids)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _capture(self, make: Callable[[], Any]) -> Any:
        """What is captured; None where it cannot be, and then nothing is any more."""
        try:
            return make()
        except RuntimeError as error:
            if "captur" not in str(error):
                raise
            self._refused = True
            logger.warning("%s runs without CUDA graphs: %s", type(self.model).__name__, error)
            return None

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
        if position_ids is None or attention_mask is None:
            positions = length + torch.arange(tokens, device=input_ids.device)
            slots = torch.arange(state.capacity, device=input_ids.device)
            position_ids = positions.expand(batch, -1) if position_ids is None else position_ids
            seen = (slots <= positions[:, None]).expand(batch, 1, -1, -1)
            attention_mask = seen if attention_mask is None else attention_mask
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
            graph = self._capture(lambda: _Graph(self._captured, state, cache, size))
            if graph is None:
                return None
            state.graphs[size] = graph
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

        run()  # libraries set themselves up, which a graph cannot record
        restore()
        self._replay = captured(run)

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
        return self._replay().clone()


class _Step:
    """One token for a cache of `SteppedLayer`s, whose memory is this. Inputs have fixed places."""

    def __init__(self, memory: list[tuple[Tensor | None, ...] | None]) -> None:
        # Until it is captured it keeps no memory alive.
        self._memory = [[part if part is None else weakref.ref(part) for part in parts or ()] for parts in memory]
        self._ready = all(parts is not None for parts in memory)
        self.captured = False

    def holds(self, memory: list[tuple[Tensor | None, ...] | None]) -> bool:
        """Whether a cache still has this memory, and its next step is as later ones."""
        return self._ready and all(
            len(now or ()) == len(then)
            and all((b if b is None else b()) is a for a, b in zip(now or (), then, strict=True))
            for now, then in zip(memory, self._memory, strict=True)
        )

    def capture(self, forward: Callable[..., Any], cache: Cache, ids: Tensor, positions: Tensor) -> _Step:
        """Itself, with a graph."""
        self.ids, self.positions = ids.clone(), positions.clone()
        stand_in = copy.copy(cache)
        stand_in.layers = [layer.for_steps() for layer in cast("list[SteppedLayer]", cache.layers)]

        def run() -> Tensor:
            logits: Tensor = forward(
                input_ids=self.ids, position_ids=self.positions, past_key_values=stand_in, **OPTIONS
            ).logits
            return logits

        self._replay = captured(run)
        self.captured = True
        return self

    def replay(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits [batch, 1, vocabulary] of the next token."""
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        return self._replay().clone()


def captured(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """What replays a function that has run before, as a CUDA graph: the result is at the same place each time."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
