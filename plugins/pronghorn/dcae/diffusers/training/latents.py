"""Training a diffusion model on the latents of a data set, as `dump_latents` writes them."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from pronghorn.dcae.crops import ENDLESS
from pronghorn.dcae.diffusers.training.loop import MODEL, Loop
from pronghorn.dcae.diffusers.training.record import made_from
from pronghorn.dcae.diffusion import DiffusionConfig
from pronghorn.dcae.digests import digest, digest_of_files
from pronghorn.dcae.folders import files_in
from pronghorn.dcae.latents import read_latent


class Latents(Dataset[tuple[Tensor, int]]):
    """Latents and their classes in random order, again and again; the same for the same number.

    Args:
        folder: .npy files [channels, height, width], scaled; in a folder for each class, or all of one class.
        seed: of the order.

    Raises:
        ValueError: there are none, or some lie beside the folders of classes.
    """

    def __init__(self, folder: str | Path, *, seed: int = 0) -> None:
        self.folder = folder = Path(folder)
        self.paths, self.seed = files_in(folder, (".npy",), argument="latents"), seed
        if not self.paths:
            raise ValueError(f"{folder}: has no latents; wanted .npy files, as `pronghorn dcae dump` writes them")
        names = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in self.paths]
        self.classes = sorted(set(names))
        if "" in names and len(self.classes) > 1:
            stray = self.paths[names.index("")]
            raise ValueError(f"latents: {stray} lies beside the folders of classes; wanted all latents in such folders")
        self.labels = [self.classes.index(name) for name in names]
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        turn, place = divmod(index, len(self.paths))
        which = int(self._order(turn)[place])
        return read_latent(self.paths[which]), self.labels[which]

    def digest(self) -> str:
        """Of names and sizes, and of how a file of each class ends: which tells of folders that changed their names."""
        firsts = [self.paths[self.labels.index(label)] for label in range(len(self.classes))]
        return digest([digest_of_files(self.paths, self.folder), *(_end(path).hex() for path in firsts)])

    def _shuffled(self, turn: int) -> np.ndarray:
        return np.random.default_rng([self.seed, turn]).permutation(len(self.paths))


def _end(path: Path) -> bytes:
    """The digest of a latent of ours, numbers of any other."""
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, 64), os.SEEK_END)
        return file.read()


class DiffusionTrainer:
    """Trains a diffusion model in place. It is broken off and gone on with as `AutoencoderTrainer` is.

    Args:
        model: a `UViT2DModel` for "uvit" and "usit", a `DiT2DModel` for "dit".
        config: how to train it.
        latents: folder of latents, see `Latents`.
        output: folder for checkpoints, `log.jsonl`, and in the end the model.
        log_with: trackers of accelerate's, as "tensorboard".

    Raises:
        ValueError: there are more classes than the model knows, latents are of another shape, or the output folder
            holds another training.
    """

    def __init__(
        self, model: Any, config: DiffusionConfig, latents: str | Path, *, output: str | Path,
        log_with: str | None = None,
    ) -> None:  # fmt: skip
        data = Latents(latents, seed=config.seed)
        if len(data.classes) > model.num_classes:
            raise ValueError(f"latents: got {len(data.classes)} classes, the model knows {model.num_classes}")
        size = model.config.sample_size
        wanted, got = (model.config.in_channels, size, size), tuple(data[0][0].shape)
        if got != wanted:
            raise ValueError(f"latents: got {got}, wanted {wanted}, as the model has it")
        self.model, self.config, self.output = model, config, Path(output)
        model.requires_grad_(True).train()
        origin = made_from(model, data.digest(), data.classes)
        self._loop = Loop(output, config, model, data, origin=origin, log_with=log_with)
        model.to(self._loop.accelerator.device)
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        self._objective = config.objective(model.num_classes)
        self._model: nn.Module = self._loop.accelerator.prepare(model)
        self._optimizer, self._schedule = self._loop.optimizer(self._loop.trained)

    @property
    def device(self) -> torch.device:
        """Where it trains."""
        return self._loop.accelerator.device

    def fit(self, on_step: Callable[[int], None] | None = None) -> None:
        """Train for the configuration's steps; the model then has the mean of its weights, and is in `output`.

        Args:
            on_step: called after each step with its number.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        loop = self._loop
        for step, batches in loop.steps():
            loss = torch.zeros(())
            for latents, labels in batches:
                with loop.accelerator.accumulate(self._model):
                    loss = self._objective(self._model, latents, labels)
                    loop.backward(loss)
                    loop.update(self._optimizer, self._schedule, loop.trained)
            loop.count()
            loop.log(step, {"loss": loss.item()})
            if on_step is not None:
                on_step(step)
        loop.finish(self.model, self.output / MODEL)
        self.model.eval()
