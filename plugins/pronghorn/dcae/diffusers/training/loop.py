"""Steps that can be broken off: checkpoints that are there whole or not at all, a log, and a mean of the weights."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, broadcast, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from pronghorn.dcae.diffusers.training.record import check_record, write_record
from pronghorn.files.atomic import remove_parts, write_atomically
from pronghorn.files.sealed import check_seal, seal
from pronghorn.files.tensor_files import load_tensors, save_tensors
from pronghorn.files.whole_folders import made_whole

logger = logging.getLogger(__name__)

CHECKPOINTS, LOG, MODEL = "checkpoints", "log.jsonl", "model"
MEAN, MEAN_FORMAT = "mean.safetensors", 1
KEPT = 2  # checkpoints
LONGEST_NAME = 255  # bytes, of a file


class Loop:
    """What the training of an autoencoder and of a diffusion model have in common.

    Args:
        output: folder for checkpoints, the log and results; what lies there is gone on with.
        config: `PhaseConfig` or `DiffusionConfig`.
        module: what is trained: its parameters that want gradients.
        data: examples, as many as are asked for: that of a number is always the same.
        origin: what it is made from, see `made_from`.
        log_with: trackers of accelerate's, as "tensorboard".

    Raises:
        ValueError: the folder holds another training, with other settings, weights or data, or more steps.
    """

    def __init__(
        self, output: str | Path, config: Any, module: nn.Module, data: Dataset[Any], *, origin: dict[str, Any],
        log_with: str | None,
    ) -> None:  # fmt: skip
        self.output, self.config, self.origin = Path(output), config, origin
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision, log_with=log_with, project_dir=self.output,
            # The batches of the last step are read before they are used: their end must not end it halfway.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=False),
        )  # fmt: skip
        self._check_folder()
        set_seed(config.seed, device_specific=True)
        if log_with is not None:
            self.accelerator.init_trackers("pronghorn-dcae", config.to_dict())
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.ema = EMAModel(self.trained, decay=config.ema_decay, use_ema_warmup=True, inv_gamma=1, power=3 / 4)
        self.ema.to(self.accelerator.device)
        self.step = 0  # that is done
        self._needed = _bytes_of(module.state_dict().values())  # by a checkpoint
        self._data = data

    def optimizer(self, parameters: list[nn.Parameter], learning_rate: float | None = None) -> tuple[Any, Any]:
        """AdamW over parameters as the configuration has it, with its schedule, prepared."""
        config = self.config
        # AdamW's two moments, and the mean of the weights or those of a discriminator.
        self._needed += 3 * _bytes_of(parameters)
        optimizer = torch.optim.AdamW(
            parameters, lr=config.learning_rate if learning_rate is None else learning_rate, betas=config.betas,
            weight_decay=config.weight_decay,
        )  # fmt: skip
        # accelerate steps a schedule once for each process
        warmup = config.warmup_steps * self.accelerator.num_processes
        schedule = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=warmup)
        prepared: tuple[Any, Any] = self.accelerator.prepare(optimizer, schedule)
        return prepared

    def steps(self) -> Iterator[tuple[int, list[Any]]]:
        """The number of each step that is left, from 1, and its batches; between steps, all is saved."""
        self._resume()
        config, accelerator = self.config, self.accelerator
        per_step = config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        left = range(self.step * per_step, config.steps * per_step)
        loader = accelerator.prepare(
            DataLoader(
                Subset(self._data, left), batch_size=config.batch_size, num_workers=config.workers,
                # Where none is given, a loader that starts draws a number that training would have drawn.
                generator=torch.Generator(),
            )
        )  # fmt: skip
        batches = iter(loader)
        bar = tqdm(range(self.step + 1, config.steps + 1), initial=self.step, total=config.steps,
                   desc="training", disable=not accelerator.is_main_process)  # fmt: skip
        for step in bar:
            yield step, [next(batches) for _ in range(config.gradient_accumulation_steps)]
            self.step = step
            if config.save_every and step % config.save_every == 0:
                self._save(step)

    def backward(self, loss: Tensor) -> None:
        """Gradients of a loss, once it is known to be a number.

        Raises:
            FloatingPointError: it is not finite. Weights and checkpoints are those of the step before.
        """
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"loss: got {loss.item()} in step {self.step + 1}; the weights are those of the step before. "
                "Lower learning_rate, or set max_grad_norm"
            )
        self.accelerator.backward(loss)

    def update(self, optimizer: Any, schedule: Any, parameters: list[nn.Parameter]) -> None:
        """A step of an optimizer, and of its schedule."""
        if self.accelerator.sync_gradients and self.config.max_grad_norm:
            self.accelerator.clip_grad_norm_(parameters, self.config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write numbers of a step to the log and to the trackers."""
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            # Not before the first step: what fails until then may be started with other settings.
            write_record(self.output, self.config.to_dict(), self.origin)
            with (self.output / LOG).open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    @contextmanager
    def mean_weights(self) -> Iterator[None]:
        """The model has the mean of its weights over steps for a while."""
        if not self.config.ema_decay:
            yield
            return
        self.ema.store(self.trained)
        self.ema.copy_to(self.trained)
        try:
            yield
        finally:
            self.ema.restore(self.trained)

    def count(self) -> None:
        """Take the weights of a step into their mean."""
        if self.config.ema_decay:
            self.ema.step(self.trained)

    def finish(self, model: Any, folder: Path) -> None:
        """Give a model the mean of its weights for good, save it, and close the trackers."""
        if self.config.ema_decay:
            self.ema.copy_to(self.trained)
        if self.config.gradient_checkpointing:
            model.disable_gradient_checkpointing()
        if self.accelerator.is_main_process:
            with made_whole(folder, needed=_bytes_of(model.state_dict().values()), overwrite=True) as whole:
                model.save_pretrained(whole)
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.accelerator.num_processes > 1:  # a process alone may be in a group of someone else, as vLLM's
            self.accelerator.state.destroy_process_group()

    def _check_folder(self) -> None:
        usual = {field.name: field.default for field in fields(self.config)}
        check_record(self.output, self.config.to_dict(), self.origin, usual)
        done = max((int(path.name) for path in self._checkpoints()), default=0)
        if done > self.config.steps:
            raise ValueError(
                f"steps: got {self.config.steps}, the training in {self.output} has done {done}; wanted at least these"
            )

    def _save(self, step: int) -> None:
        folder, first = self.output / CHECKPOINTS, self.accelerator.is_main_process
        target = folder / f"{step:08d}"
        with made_whole(target, needed=self._needed, overwrite=True) if first else nullcontext() as whole:
            unfinished = folder / self._told("" if whole is None else whole.name)
            self.accelerator.save_state(str(unfinished))
            self.accelerator.wait_for_everyone()
            if first:
                self._save_mean(unfinished / MEAN)
                seal(unfinished, ("**/*",))
        if first:
            found = self._checkpoints()
            # Those of later steps are damaged, or this step would not have been done again.
            kept = [path for path in found if int(path.name) <= step][-KEPT:]
            for path in found:
                if path not in kept:
                    shutil.rmtree(path)

    def _told(self, name: str) -> str:
        """What the main process gives for the name of a file, on all."""
        letters = torch.tensor([*name.encode().ljust(LONGEST_NAME, b"\0")], device=self.accelerator.device)
        return bytes(broadcast(letters).tolist()).rstrip(b"\0").decode()

    def _resume(self) -> None:
        if (newest := self._newest()) is not None:
            self._load_mean(newest / MEAN)
            try:
                self.accelerator.load_state(str(newest))
            except RuntimeError as error:
                if "loading state_dict" not in str(error):  # not enough memory, say
                    raise
                told = " ".join(str(error).split())
                raise ValueError(f"{newest}: is a checkpoint of another architecture: {told}") from error
        if self.accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            # Of a training that was killed while it saved.
            remove_parts(self.output)
            for path in (*(self.output / CHECKPOINTS).glob(".*"), *self.output.glob(f".{MODEL}.*")):
                shutil.rmtree(path)
            self._cut_log()

    def _newest(self) -> Path | None:
        """The newest checkpoint, or where it is damaged, the newest of those that are sealed.

        Raises:
            ValueError, FileNotFoundError: all are damaged; what is said is of the newest.
        """
        damaged: dict[Path, Exception] = {}
        for path in reversed(self._checkpoints()):
            try:
                sealed = check_seal(path)
            except (ValueError, FileNotFoundError) as error:
                damaged[path] = error
                continue
            if damaged and not sealed:  # one that nothing says to be whole is no better
                continue
            if damaged and self.accelerator.is_main_process:
                logger.warning("training goes on from %s: %s", path, "; ".join(map(str, damaged.values())))
            return path
        if damaged:
            raise next(iter(damaged.values()))
        return None

    # Not by accelerate, which unpickles whatever objects of ours it is given to keep.
    def _save_mean(self, path: Path) -> None:
        """The mean of the weights, and how many steps are done."""
        state = self.ema.state_dict()
        mean = {str(number): tensor for number, tensor in enumerate(state.pop("shadow_params"))}
        save_tensors(
            path, mean if self.config.ema_decay else {}, format=MEAN_FORMAT, notes={**state, "step": self.step}
        )

    def _load_mean(self, path: Path) -> None:
        if not path.exists():
            raise ValueError(
                f"{path.parent}: holds no {MEAN}, so an earlier Pronghorn made it; begin in another folder"
            )
        tensors, notes = load_tensors(path, newest=MEAN_FORMAT)
        shapes = [tuple(parameter.shape) for parameter in self.trained] if self.config.ema_decay else []
        mean = [tensors[key] for key in sorted(tensors, key=int)]
        if notes is None or [tuple(tensor.shape) for tensor in mean] != shapes:
            raise ValueError(f"{path.parent}: is a checkpoint of another architecture")
        self.step = notes.pop("step")
        self.ema.load_state_dict(notes | ({"shadow_params": mean} if mean else {}))
        self.ema.to(self.accelerator.device)

    def _cut_log(self) -> None:
        """Leave what is known of the steps that are done: those after the checkpoint are done again."""
        path = self.output / LOG
        if not path.exists():
            return
        lines: dict[int, str] = {}
        for line in path.read_text().splitlines():
            with suppress(ValueError):  # the last one may have been broken off
                lines[json.loads(line)["step"]] = line
        kept = [lines[step] for step in sorted(lines) if step <= self.step]
        write_atomically(path, "".join(f"{line}\n" for line in kept).encode())

    def _checkpoints(self) -> list[Path]:
        folder = self.output / CHECKPOINTS
        return sorted(path for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
