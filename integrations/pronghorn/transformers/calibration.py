"""Calibration: decoder blocks one after the other, each with the inputs it gets in the running model.

One pass of the model with its blocks replaced by stand-ins records what every block is called with; after that only
the hidden states travel, from block to block, so that one block and its inputs are all that must fit on the device.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from pronghorn.estimate import Estimate, folder_bytes, now, peak_bytes, times_tried
from pronghorn.files.room import check_room
from pronghorn.out_of_memory import is_out_of_memory
from pronghorn.transformers.activation_store import ActivationStore
from pronghorn.transformers.calibration_capture import BlockCalls
from pronghorn.transformers.calibration_data import check_token_ids
from pronghorn.transformers.calibration_plan import CalibrationPlan, Undertaking, disk_bytes_of, plan_of
from pronghorn.transformers.calibration_state import BlockResult, CalibrationState, fingerprint_of
from pronghorn.transformers.decoder import Block, find_decoder_blocks
from pronghorn.transformers.finite import check_weights
from pronghorn.versions import code_of

__all__ = ["BlockInputs", "BlockResult", "CalibrationPlan", "CalibrationRunner"]

ACTIVATION_BUDGET = 4 << 30
MOST_HALVINGS = 3  # of the chunks, when a block does not fit

Done = TypeVar("Done")


class BlockInputs:
    """One block's calibration inputs; every iteration yields (hidden states [batch, tokens, hidden], arguments)."""

    def __init__(self, store: ActivationStore, arguments: Sequence[Mapping[str, Any]], device: torch.device) -> None:
        self._store = store
        self._arguments = arguments
        self._device = device
        self.num_tokens = sum(chunk.shape[0] * chunk.shape[1] for chunk in store)

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for hidden_states, arguments in zip(self._store, self._arguments, strict=True):
            yield hidden_states.to(self._device), _moved(dict(arguments), self._device)


@dataclass
class _Chunks:
    """What travels from block to block: the store changes with every block, the rest only where chunks are halved."""

    ids: list[Tensor]
    store: ActivationStore
    arguments: list[list[dict[str, Any]]]  # [chunk][block]
    halvings: int = 0

    def inputs(self, index: int, device: torch.device) -> BlockInputs:
        return BlockInputs(self.store, [of_blocks[index] for of_blocks in self.arguments], device)


class CalibrationRunner:
    """Runs a method's search over the decoder blocks of a model.

    Args:
        model: a causal language model; it is not changed, save by `transform`.
        samples: int64 token ids [batch, tokens], one chunk each.
        state_dir: where finished blocks are kept, so that an interrupted run goes on where it was; None keeps nothing.
        fingerprint: what else (the method's settings) must be the same for a run to be continued.
        anew: do not go on with what `state_dir` holds: `run` gives it up when it has found nothing to refuse.
        device: where blocks run; the model's own device by default. A block on another device visits for its turn.
        activation_budget: bytes of hidden states kept in memory, beyond it they go to disk.
        progress: show a bar.

    Raises:
        ValueError, TypeError: no samples, or a sample that is not ids of the model's vocabulary.
    """

    def __init__(
        self,
        model: Any,
        samples: Sequence[Tensor],
        *,
        state_dir: Path | str | None = None,
        fingerprint: Mapping[str, Any] | None = None,
        anew: bool = False,
        device: torch.device | str | None = None,
        activation_budget: int = ACTIVATION_BUDGET,
        progress: bool = True,
    ) -> None:
        check_token_ids(samples, model.get_input_embeddings().weight.shape[0])
        self.model = model
        self.samples = list(samples)
        self.blocks = find_decoder_blocks(model)
        self.device = torch.device(device) if device is not None else next(model.parameters()).device
        self.activation_budget = activation_budget
        self.progress = progress
        self.state_dir = None if state_dir is None else Path(state_dir)
        self.fingerprint = dict(fingerprint or {})
        self.anew = anew

    @torch.no_grad()
    def run(
        self,
        search: Callable[[Block, BlockInputs], BlockResult],
        transform: Callable[[Block, BlockResult], None] | None = None,
        *,
        first: int | None = None,
    ) -> dict[str, BlockResult]:
        """Search every block in order; results by block name.

        Args:
            search: called with a block on the run's device and its inputs; once more with smaller chunks where it
                runs out of memory, so it must leave the block as it was.
            transform: changes a block by its result, so that the next blocks see what it then puts out; without it
                every block sees what the original model gives it.
            first: stop after so many blocks.

        Raises:
            ValueError: NaN or Inf in weights or activations, or a `state_dir` of another run (the fields are named).
            OSError: the disk has no room, said before the start, or the directory cannot be written.
            torch.OutOfMemoryError: a block does not fit, even with smaller chunks.
        """
        check_weights(self.model)
        results: dict[str, BlockResult] = {}
        with self._evaluation():
            directory = self._directory_with_room()
            settings = {"code": code_of(search), **self.fingerprint}
            state = CalibrationState(
                self.state_dir, lambda: fingerprint_of(self.model, self.samples, settings, self.device), anew=self.anew
            )
            calls = BlockCalls(self.model, self.blocks)
            chunks = self._capture(calls, directory)
            bar = tqdm(self.blocks[:first], desc="calibrating", unit="block", disable=not self.progress)
            for index, block in enumerate(bar):
                with self._visiting(block):
                    bar.set_postfix_str(f"{block.name}: search")
                    result = self._result(search, index, chunks, calls, state)
                    results[block.name] = result
                    if transform is not None:
                        transform(block, result)
                    if index + 1 < len(self.blocks):
                        bar.set_postfix_str(f"{block.name}: forward")
                        halve = partial(_halve, chunks, calls)
                        self._smaller_if_needed(block.name, chunks, halve, partial(self._advance, index, chunks))
        return results

    def rehearse(self, search: Callable[[Block, BlockInputs], BlockResult]) -> tuple[Estimate, int]:
        """What `run` will take, from the search of the first block, of which nothing is kept.

        Blocks are taken to be alike. Errors are those of `run`.

        Returns:
            The estimate, and the bytes of all results.
        """
        started, begun = time.perf_counter(), []

        def timed(block: Block, inputs: BlockInputs) -> BlockResult:
            for _ in range(times_tried(self.device)):
                begun.append(now(self.device))
                found = search(block, inputs)
            return found

        trial, count = copy.copy(self), len(self.blocks)
        with tempfile.TemporaryDirectory() as folder:
            trial.state_dir = Path(folder)
            trial.run(timed, first=1)
            results = count * folder_bytes(Path(folder))
        seconds = begun[0] - started + count * (now(self.device) - begun[-1])
        spilled = disk_bytes_of(dataclasses.replace(self._undertaking(), keeps_results=False))
        disk = spilled + (0 if self.state_dir is None else results)
        return Estimate(peak_bytes(self.device), disk, seconds, f"one of {count} blocks"), results

    @torch.no_grad()
    def plan(self, estimate: Callable[[Block, int], tuple[float, int]]) -> CalibrationPlan:
        """What `run` will take; one block runs once on one sample to measure how fast it is.

        Args:
            estimate: FLOPs, and bytes of workspace on the run's device, of the search of a block with so many tokens.
        """
        with self._evaluation():
            largest = max(self.samples, key=Tensor.numel)
            hidden_states, arguments = BlockCalls(self.model, self.blocks).record(largest)
            block = self.blocks[0]
            with self._visiting(block):
                inputs = hidden_states.to(self.device), _moved(arguments[0], self.device)
                return plan_of(
                    self._undertaking(),
                    estimate,
                    lambda: block.module(inputs[0], **inputs[1]),
                    hidden_states,
                    arguments,
                )

    def _result(
        self,
        search: Callable[[Block, BlockInputs], BlockResult],
        index: int,
        chunks: _Chunks,
        calls: BlockCalls,
        state: CalibrationState,
    ) -> BlockResult:
        """A block's saved result, or a new one that is then saved."""
        saved = state.load(index, self.device)
        if saved is not None:
            result, halvings = saved
            while chunks.halvings < halvings:  # so that later blocks see the same bits as in an unbroken run
                _halve(chunks, calls)
            return result
        block = self.blocks[index]
        result = self._smaller_if_needed(
            block.name, chunks, partial(_halve, chunks, calls), lambda: search(block, chunks.inputs(index, self.device))
        )
        state.save(index, result, chunks.halvings)
        return result

    def _capture(self, calls: BlockCalls, directory: Path) -> _Chunks:
        # Half of the budget: the inputs of the next block grow while those of this one are still there.
        chunks = _Chunks(list(self.samples), ActivationStore(self.activation_budget // 2, directory), [])

        def record() -> None:
            chunks.store, chunks.arguments = ActivationStore(chunks.store.budget, directory), []
            for index, ids in enumerate(chunks.ids):
                hidden_states, arguments = calls.record(ids)
                _check_finite(hidden_states, index, "the embedding")
                chunks.store.append(hidden_states)
                chunks.arguments.append(arguments)

        self._smaller_if_needed("what surrounds the blocks", chunks, partial(_halve_ids, chunks), record)
        return chunks

    def _advance(self, index: int, chunks: _Chunks) -> None:
        """Replace a block's inputs by its outputs."""
        block = self.blocks[index]
        following = ActivationStore(chunks.store.budget, chunks.store.directory)
        for sample, (hidden_states, arguments) in enumerate(chunks.inputs(index, self.device)):
            output = block.module(hidden_states, **arguments)
            output = output if isinstance(output, Tensor) else output[0]
            _check_finite(output, sample, block.name)
            following.append(output)
        chunks.store = following

    def _smaller_if_needed(
        self, what: str, chunks: _Chunks, halve: Callable[[], None], work: Callable[[], Done]
    ) -> Done:
        """Do the work; where memory runs out, halve the chunks for good and do it again."""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                batch = max(len(ids) for ids in chunks.ids)
                if batch == 1 or chunks.halvings == MOST_HALVINGS:
                    tokens = max(ids.shape[1] for ids in chunks.ids)
                    raise torch.OutOfMemoryError(
                        f"{what} does not fit on {self.device} with {batch} sequence(s) of {tokens} tokens at a "
                        f"time{_memory_of(self.device)}: give shorter or fewer calibration samples (seq_len, "
                        f"n_samples), smaller batches, or another device ({error})"
                    ) from error
            # Here the error is gone, and with it what its frames held.
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            halve()

    def _undertaking(self) -> Undertaking:
        tokens = sum(ids.numel() for ids in self.samples)
        return Undertaking(
            self.model, self.blocks, tokens, self.device, self.activation_budget, self.state_dir is not None
        )

    def _directory_with_room(self) -> Path:
        """Where activations are spilled to, which has room for all that a run writes."""
        directory = Path(tempfile.gettempdir()) if self.state_dir is None else self.state_dir
        directory.mkdir(parents=True, exist_ok=True)
        check_room(directory, disk_bytes_of(self._undertaking()))
        return directory

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


def _halve(chunks: _Chunks, calls: BlockCalls) -> None:
    """Cut every chunk in two; the arguments are recorded anew, since not all have one row a sequence."""
    store = ActivationStore(chunks.store.budget, chunks.store.directory)
    for hidden_states in chunks.store:
        for part in hidden_states.split((len(hidden_states) + 1) // 2):
            store.append(part)
    chunks.store = store
    _halve_ids(chunks)
    chunks.arguments = [calls.record(ids)[1] for ids in chunks.ids]


def _halve_ids(chunks: _Chunks) -> None:
    chunks.ids = [part for ids in chunks.ids for part in ids.split((len(ids) + 1) // 2)]
    chunks.halvings += 1


def _memory_of(device: torch.device) -> str:
    if device.type == "cuda":
        peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.mem_get_info(device)[1]
    elif os.name == "posix":
        import resource

        # In KiB, on macOS in bytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
        total = total if allowed == resource.RLIM_INFINITY else min(total, allowed)
    else:
        return ""
    return f" (peak {peak / 2**30:.1f} of {total / 2**30:.1f} GiB)"


def _moved(value: Any, device: torch.device) -> Any:
    """The same with every tensor on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(entry, device) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(entry, device) for entry in value)
    return value


def _check_finite(hidden_states: Tensor, sample: int, where: str) -> None:
    bad = int((~hidden_states.isfinite()).sum())
    if bad:
        raise ValueError(f"calibration sample {sample}: {bad} activations after {where} are NaN or Inf")
