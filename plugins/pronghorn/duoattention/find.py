"""Finds the retrieval heads of a model: by optimizing gates, or in seconds by what heads look at."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from pronghorn.duoattention.gates import GateOptimizer, Step
from pronghorn.duoattention.pattern import Pattern, save_pattern
from pronghorn.duoattention.sequence_parallel import SequenceParallel
from pronghorn.estimate import Estimate, Pieces, StepClock, folder_bytes, peak_bytes
from pronghorn.versions import code_of


def find_heads(
    model: Any,
    dataset: Sequence[dict[str, Tensor]],
    *,
    method: Literal["optimise", "on_the_fly"] = "optimise",
    num_steps: int = 2000,
    lr: float = 0.02,
    reg_weight: float = 0.05,
    initial_value: float = 1.0,
    sink_size: int = 128,
    recent_size: int = 256,
    block_size: int | None = 128,
    dense_branch: Literal["teacher", "student"] = "teacher",
    gate_dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = True,
    samples: int = 8,
    seed: int = 42,
    state_dir: Path | str | None = None,
    anew: bool = False,
    save_steps: int = 50,
    parallel: SequenceParallel | None = None,
    on_step: Callable[[Step, GateOptimizer], None] | None = None,
) -> Pattern:
    """The gates of a model.

    Args:
        model: a causal language model of transformers; its weights stay as they are.
        dataset: samples with `input_ids` [tokens] and `labels` [tokens], -100 where nothing is asked; one a step, in
            random order.
        method: "optimise" trains a gate for each head (hours for a large model); "on_the_fly" measures, on `samples`
            samples, how much each head's output depends on what a streaming head would not see (seconds).
        num_steps: steps of the optimization (paper: 2000).
        lr: its highest learning rate (paper: 0.02).
        reg_weight: weight of the gates' mean magnitude (paper: 0.05).
        initial_value: of the gates.
        sink_size: first tokens that streaming heads see (paper: 128).
        recent_size: last tokens that they see (paper: 256).
        block_size: granularity of what they see: 128 as in the paper, None for single tokens.
        dense_branch: "teacher" as in the authors' code, or "student": attention over all of the student's own tokens.
        gate_dtype: of the gates; the authors' are bf16.
        gradient_checkpointing: keep only what enters each layer, and compute it twice.
        samples: what "on_the_fly" looks at.
        seed: of the order and of what the data set draws.
        state_dir: keeps progress every `save_steps` steps; the same call then goes on where it was.
        anew: give up the progress that `state_dir` holds, once nothing was found to refuse.
        save_steps: see there.
        parallel: the ranks that share each sequence.
        on_step: called after each step.

    Returns:
        A pattern; `save_pattern` writes it, `DuoAttentionConfig(gates=…)` takes its gates.

    Raises:
        ValueError: bad settings or data, NaN or infinity in weights or activations, an attention whose heads cannot be
            gated, or a state of another run.

    Source: DuoAttention (arXiv 2410.10819), section 2.2.
    """
    for name, value in (("num_steps", num_steps), ("samples", samples), ("save_steps", save_steps)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, wanted a positive number")
    if not len(dataset):
        raise ValueError("dataset: is empty")
    from pronghorn.transformers.finite import check_weights

    check_weights(model)
    streaming: dict[str, Any] = {"sink_size": sink_size, "recent_size": recent_size, "block_size": block_size}
    text = model.config.get_text_config()
    shape = (text.num_hidden_layers, getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    settings: dict[str, Any] = {**streaming, "method": method, "seed": seed}
    if method == "on_the_fly":
        from pronghorn.duoattention.transformers.scores import head_scores

        gates = head_scores(model, (_drawn(dataset, step, seed) for step in range(samples)), shape, **streaming)
        return Pattern(gates, {**settings, "samples": samples})
    if method != "optimise":
        raise ValueError(f"method: got {method!r}, accepted are optimise, on_the_fly")
    settings |= {
        "num_steps": num_steps, "lr": lr, "reg_weight": reg_weight, "initial_value": initial_value,
        "dense_branch": dense_branch, "gate_dtype": str(gate_dtype),
    }  # fmt: skip
    from pronghorn.duoattention.transformers.gated import TwoStreams

    optimizer = GateOptimizer(
        shape, num_steps=num_steps, lr=lr, reg_weight=reg_weight, initial_value=initial_value, dtype=gate_dtype,
        device=model.device, parallel=parallel,
    )  # fmt: skip
    streams = TwoStreams(
        model, optimizer.gates, dense_branch=dense_branch, parallel=parallel,
        gradient_checkpointing=gradient_checkpointing, **streaming,
    )  # fmt: skip
    state = _State(state_dir, model, dataset, settings, seed, optimizer.parallel, anew)
    state.restore(optimizer)
    with streams, tqdm(total=num_steps, initial=optimizer.step, desc="gates", disable=None) as bar:
        while optimizer.step < num_steps:
            sample = _drawn(dataset, optimizer.step, seed)
            ids, labels = (sample[name][None].to(model.device) for name in ("input_ids", "labels"))
            found = optimizer.train_step(streams, ids, labels)
            bar.set_postfix(distillation=f"{found.distillation:.3g}", gates=f"{found.regularization:.3f}")
            bar.update()
            if optimizer.step % save_steps == 0 or optimizer.step == num_steps:
                state.keep(optimizer)
            if on_step is not None:
                on_step(found, optimizer)
    return Pattern(optimizer.table(), settings)


def rehearse(
    model: Any, dataset: Sequence[dict[str, Tensor]], *, num_steps: int, seed: int, **options: Any
) -> Estimate:
    """What `find_heads` and its files take when it optimizes: from steps of lengths between which time goes evenly.

    Args:
        model: as for `find_heads`, as all others are.
        dataset: likewise.
        num_steps: likewise.
        seed: likewise.
        **options: likewise, without `state_dir`.
    """
    from pronghorn.duoattention.plot import plot_gates

    of_samples = [len(dataset[index]["input_ids"]) for index in range(len(dataset))]
    lengths = [of_samples[_index(len(dataset), step, seed)] for step in range(num_steps)]
    pieces, clock = Pieces(lengths, model.device, "steps"), StepClock(model.device)
    with tempfile.TemporaryDirectory() as folder:
        found = find_heads(
            model, _InTurn([_drawn(dataset, step, seed) for step in pieces.order]), num_steps=len(pieces.order),
            seed=seed, state_dir=folder, on_step=clock, **options,
        )  # fmt: skip
        save_pattern(found, Path(folder) / "pattern")
        plot_gates(found.gates, Path(folder) / "pattern" / "gates.png")
        written = folder_bytes(Path(folder))
    return Estimate(peak_bytes(model.device), written, pieces.seconds(clock.taken()), pieces.basis)


class _InTurn(Sequence[dict[str, Tensor]]):
    """A data set of one sample, which is the next of several whenever it is read in training."""

    def __init__(self, samples: Sequence[dict[str, Tensor]]) -> None:
        self._samples, self._reads = samples, -1  # the first read is the fingerprint's

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> Any:
        self._reads += 1
        return self._samples[max(self._reads - 1, 0) % len(self._samples)]


def _drawn(dataset: Any, step: int, seed: int) -> dict[str, Tensor]:
    """The sample of a step: epochs are permuted, and what a sample draws depends on the step alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed + step)
        return dataset[_index(len(dataset), step, seed)]


def _index(samples: int, step: int, seed: int) -> int:
    """Of the sample of a step."""
    epoch, place = divmod(step, samples)
    return int(torch.randperm(samples, generator=torch.Generator().manual_seed(seed + epoch))[place])


class _State:
    """A run's progress in a folder, if there is one."""

    def __init__(
        self, folder: Path | str | None, model: Any, dataset: Any, settings: dict[str, Any], seed: int,
        parallel: SequenceParallel, anew: bool,
    ) -> None:  # fmt: skip
        from pronghorn.duoattention.transformers.gated import TwoStreams
        from pronghorn.transformers.calibration_state import CalibrationState, fingerprint_of

        settings = {"code": code_of(find_heads, TwoStreams), **settings, "ranks": parallel.size}

        def fingerprint() -> dict[str, Any]:
            # Each sample as it is first drawn: what later epochs draw from it depends on the seed.
            drawn = (_drawn(dataset, step, seed) for step in range(min(len(dataset), settings["num_steps"])))
            read = (sample[name] for sample in drawn for name in ("input_ids", "labels"))
            return fingerprint_of(model, read, settings, model.device)

        first = parallel.rank == 0
        if anew and not first:
            parallel.wait()  # or this rank would read what the first one gives up
        self._files = CalibrationState(None if folder is None else Path(folder), fingerprint, anew=anew and first)
        if anew and first:
            parallel.wait()
        self._device = model.device

    def restore(self, optimizer: GateOptimizer) -> None:
        kept = self._files.load(0, self._device)
        if kept is not None:
            optimizer.load_state_dict(kept[0].tensors)

    def keep(self, optimizer: GateOptimizer) -> None:
        from pronghorn.transformers.calibration_state import BlockResult

        if optimizer.parallel.rank == 0:
            self._files.save(0, BlockResult(optimizer.state_dict()), 0)
