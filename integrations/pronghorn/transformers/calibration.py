"""Calibration: decoder blocks one after the other, each with the inputs it gets in the running model.

One pass of the model with its blocks replaced by stand-ins records what every block is called with; after that only
the hidden states travel, from block to block, so that one block and its inputs are all that must fit on the device.
"""

from __future__ import annotations

import inspect
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pronghorn.transformers.activation_store import ActivationStore
from pronghorn.transformers.calibration_state import BlockResult, CalibrationState, fingerprint_of
from pronghorn.transformers.decoder import Block, find_decoder_blocks

__all__ = ["BlockInputs", "BlockResult", "CalibrationPlan", "CalibrationRunner"]

ACTIVATION_BUDGET = 4 << 30
LARGEST_SPLIT = 8  # a chunk that does not fit is halved at most three times
RESULT_SHARE = 0.1  # of the weights' bytes: what results are assumed to take on disk


@dataclass(frozen=True)
class CalibrationPlan:
    """What a run will take, before anything starts."""

    blocks: int
    tokens: int
    peak_memory_bytes: int
    disk_bytes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.blocks} blocks, {self.tokens} calibration tokens: "
            f"peak memory {self.peak_memory_bytes / 2**30:.2f} GiB, disk {self.disk_bytes / 2**20:.0f} MiB, "
            f"about {self.seconds / 60:.1f} minutes"
        )


class BlockInputs:
    """One block's calibration inputs; every iteration yields (hidden states [batch, tokens, hidden], arguments)."""

    def __init__(
        self, store: ActivationStore, arguments: Sequence[Mapping[str, Any]], device: torch.device, split: int = 1
    ) -> None:
        self._store = store
        self._arguments = arguments
        self._device = device
        self._split = split
        self.num_tokens = sum(chunk.shape[0] * chunk.shape[1] for chunk in store)

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for hidden_states, arguments in zip(self._store, self._arguments, strict=True):
            batch = hidden_states.shape[0]
            step = max(1, batch // self._split)
            for start in range(0, batch, step):
                rows = slice(start, start + step) if step < batch else None
                part = hidden_states if rows is None else hidden_states[rows]
                yield part.to(self._device), _moved(dict(arguments), self._device, batch, rows)


class CalibrationRunner:
    """Runs a method's search over the decoder blocks of a model.

    Args:
        model: a causal language model; it is not changed, save by `transform`.
        samples: int64 token ids [batch, tokens], one chunk each.
        state_dir: where finished blocks are kept, so that an interrupted run goes on where it was; None keeps nothing.
        fingerprint: what else (the method's settings) must be the same for a run to be continued.
        device: where blocks run; the model's own device by default. A block on another device visits for its turn.
        activation_budget: bytes of hidden states kept in memory, beyond it they go to disk.
        progress: show a bar.

    Raises:
        ValueError: no samples, NaN or Inf in a weight, or a `state_dir` of another run (the field is named).
    """

    def __init__(
        self,
        model: Any,
        samples: Sequence[Tensor],
        *,
        state_dir: Path | None = None,
        fingerprint: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        activation_budget: int = ACTIVATION_BUDGET,
        progress: bool = True,
    ) -> None:
        if not samples:
            raise ValueError("samples: empty, at least one sequence of token ids is needed")
        self.model = model
        self.samples = list(samples)
        self.blocks = find_decoder_blocks(model)
        self.device = torch.device(device) if device is not None else next(model.parameters()).device
        self.activation_budget = activation_budget
        self.progress = progress
        self.state_dir = state_dir
        self.fingerprint = dict(fingerprint or {})

    @torch.no_grad()
    def run(
        self,
        search: Callable[[Block, BlockInputs], BlockResult],
        transform: Callable[[Block, BlockResult], None] | None = None,
    ) -> dict[str, BlockResult]:
        """Search every block in order; results by block name.

        Args:
            search: called with a block on the run's device and its inputs.
            transform: changes a block by its result, so that the next blocks see what it then puts out; without it
                every block sees what the original model gives it.

        Raises:
            ValueError: NaN or Inf in weights or activations.
            OSError: the disk has no room, said before the start.
            torch.OutOfMemoryError: a block does not fit even with an eighth of a chunk.
        """
        self._check_weights()
        state = CalibrationState(self.state_dir, lambda: fingerprint_of(self.model, self.samples, self.fingerprint))
        results: dict[str, BlockResult] = {}
        with self._evaluation(), tempfile.TemporaryDirectory(prefix="pronghorn-", dir=self.state_dir) as scratch:
            self._check_disk(Path(scratch))
            store, arguments = self._capture(Path(scratch))
            bar = tqdm(self.blocks, desc="calibrating", unit="block", disable=not self.progress)
            for index, block in enumerate(bar):
                bar.set_postfix_str(block.name)
                with self._visiting(block):
                    saved = state.load(index)
                    result = saved or self._with_smaller_chunks(search, block, store, arguments[index])
                    if saved is None:
                        state.save(index, result)
                    results[block.name] = result
                    if transform is not None:
                        transform(block, result)
                    if index + 1 < len(self.blocks):
                        store = self._advance(block, store, arguments[index])
            store.clear()
        return results

    def plan(self, estimate: Callable[[Block, int], tuple[float, int]]) -> CalibrationPlan:
        """What `run` will take; `estimate` gives FLOPs and bytes of workspace for a block and a number of tokens."""
        tokens = sum(ids.numel() for ids in self.samples)
        estimates = [estimate(block, tokens) for block in self.blocks]
        parameters = list(self.model.parameters())
        element = parameters[0].element_size()
        hidden = self.model.config.get_text_config().hidden_size
        activations = 2 * tokens * hidden * element
        weights = sum(p.numel() * p.element_size() for p in parameters)
        spilled = max(0, activations - self.activation_budget)
        return CalibrationPlan(
            blocks=len(self.blocks),
            tokens=tokens,
            peak_memory_bytes=weights + activations - spilled + max(workspace for _, workspace in estimates),
            disk_bytes=spilled + (int(RESULT_SHARE * weights) if self.state_dir is not None else 0),
            seconds=sum(flops for flops, _ in estimates) / _measured_flops(self.device),
        )

    def _capture(self, scratch: Path) -> tuple[ActivationStore, list[list[dict[str, Any]]]]:
        """The first block's hidden states, and for each block its other arguments for each chunk."""
        store = ActivationStore(self.activation_budget // 2, scratch)
        arguments: list[list[dict[str, Any]]] = [[] for _ in self.blocks]
        for ids in self.samples:
            calls = _recorded_calls(self.model, self.blocks, ids)
            _check_finite(calls[0].hidden_states, len(store), "the embedding")
            store.append(calls[0].hidden_states)
            for block_arguments, call in zip(arguments, calls, strict=True):
                block_arguments.append(_moved(call.arguments, torch.device("cpu"), 0, None))
        return store, arguments

    def _advance(self, block: Block, store: ActivationStore, arguments: Sequence[Mapping[str, Any]]) -> ActivationStore:
        following = ActivationStore(store.budget, store.directory)
        for index, (hidden_states, kwargs) in enumerate(BlockInputs(store, arguments, self.device)):
            output = block.module(hidden_states, **kwargs)
            output = output if isinstance(output, Tensor) else output[0]
            _check_finite(output, index, block.name)
            following.append(output)
        store.clear()
        return following

    def _with_smaller_chunks(
        self,
        search: Callable[[Block, BlockInputs], BlockResult],
        block: Block,
        store: ActivationStore,
        arguments: Sequence[Mapping[str, Any]],
    ) -> BlockResult:
        split = 1
        while True:
            try:
                return search(block, BlockInputs(store, arguments, self.device, split))
            except torch.OutOfMemoryError as error:
                split *= 2
                if split > LARGEST_SPLIT:
                    raise torch.OutOfMemoryError(
                        f"{block.name} does not fit on {self.device} even with chunks of an eighth: give fewer or "
                        f"shorter calibration samples, or another device ({error})"
                    ) from error
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()

    def _check_weights(self) -> None:
        for name, parameter in self.model.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise ValueError(f"{name}: holds NaN or Inf")

    def _check_disk(self, scratch: Path) -> None:
        needed = self.plan(lambda block, tokens: (0.0, 0)).disk_bytes
        free = shutil.disk_usage(scratch).free
        if needed > free:
            raise OSError(f"{scratch.parent}: {needed / 2**20:.0f} MiB are needed, {free / 2**20:.0f} MiB are free")

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    @contextmanager
    def _visiting(self, block: Block) -> Iterator[None]:
        home = next(block.module.parameters()).device
        if home == self.device:
            yield
            return
        block.module.to(self.device)
        try:
            yield
        finally:
            block.module.to(home)


@dataclass
class _Call:
    hidden_states: Tensor = field(default_factory=lambda: torch.empty(0))
    arguments: dict[str, Any] = field(default_factory=dict)


def _recorded_calls(model: Any, blocks: Sequence[Block], ids: Tensor) -> list[_Call]:
    """Run the model with stand-ins for its blocks that note how they are called and pass the hidden states on."""
    calls = [_Call() for _ in blocks]
    tuples: list[bool] = []

    def stand_in(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        names = [name for name in inspect.signature(original).parameters if name != "self"]

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            arguments = {
                name: value for name, value in given.items() if name != names[0] and not _is_cache(name, value)
            }
            hidden_states = given[names[0]]
            if not tuples:
                # The first block runs once for real: some models' blocks return a tuple, most a tensor.
                tuples.append(isinstance(original(hidden_states, **arguments), tuple))
            calls[index] = _Call(hidden_states, arguments)
            return (hidden_states,) if tuples[0] else hidden_states

        return forward

    try:
        for index, block in enumerate(blocks):
            block.module.forward = stand_in(index, block.module.forward)
        device = model.get_input_embeddings().weight.device
        base = getattr(model, "base_model", model)  # without the head, whose logits nobody reads
        base(input_ids=ids.to(device), use_cache=False)
    finally:
        for block in blocks:
            block.module.__dict__.pop("forward", None)
    return calls


def _is_cache(name: str, value: Any) -> bool:
    return name in ("past_key_values", "past_key_value", "layer_past", "use_cache", "output_attentions") or (
        type(value).__name__.endswith("Cache")
    )


def _moved(value: Any, device: torch.device, batch: int, rows: slice | None) -> Any:
    """Tensors inside `value` on `device`; of those that have one row a sequence, only the wanted rows."""
    if isinstance(value, Tensor):
        part = value[rows] if rows is not None and value.dim() > 1 and value.shape[0] == batch else value
        return part.to(device)
    if isinstance(value, dict):
        return {key: _moved(entry, device, batch, rows) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(entry, device, batch, rows) for entry in value)
    return value


def _check_finite(hidden_states: Tensor, sample: int, where: str) -> None:
    bad = int((~hidden_states.isfinite()).sum())
    if bad:
        raise ValueError(f"calibration sample {sample}: {bad} activations after {where} are NaN or Inf")


def _measured_flops(device: torch.device) -> float:
    size = 512 if device.type == "cpu" else 4096
    a = torch.randn(size, size, device=device)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
