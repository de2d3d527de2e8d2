"""The AWQ search over a whole model, and what it finds in llm-awq's file format."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pronghorn.awq.block_search import BlockSearchResult, search_block
from pronghorn.awq.config import AwqConfig
from pronghorn.awq.scaling import apply_scale
from pronghorn.awq.selection import quantizable_linears
from pronghorn.awq.tracing import ScaleGroup, trace_scale_groups

FORMAT = 2  # of the file, with a digest

if TYPE_CHECKING:
    from pronghorn.estimate import Estimate
    from pronghorn.transformers.calibration import BlockInputs, BlockResult, CalibrationPlan, CalibrationRunner
    from pronghorn.transformers.decoder import Block


@dataclasses.dataclass
class SearchResult:
    """Scales and clip maxima of a model, by full module names.

    Attributes:
        scale: (previous operation, linears that read it, scale [K]) in the order of application.
        clip: (linear, maxima [N, K/g, 1]).
        report: per scale group the loss of every grid point, the chosen one, and linears that saw no token.
    """

    scale: list[tuple[str, tuple[str, ...], Tensor]]
    clip: list[tuple[str, Tensor]]
    report: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write llm-awq's format: a `.pt` with lists "scale" and "clip"; others ignore our "report" and the digest."""
        from pronghorn.files.atomic import write_atomically

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        file = io.BytesIO()
        held = {"scale": self.scale, "clip": self.clip, "report": self.report}
        torch.save({**held, "format": FORMAT, "sha256": self._digest(FORMAT)}, file)
        write_atomically(path, file.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SearchResult:
        """Read a file of `save` or of llm-awq's `--dump_awq`.

        Raises:
            ValueError: the file is not such a file.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{path} is not a search result that torch can read: {error}") from error
        if not isinstance(content, dict) or not {"scale", "clip"} <= content.keys():
            raise ValueError(f"{path} is not an AWQ search result: it must hold a dict with 'scale' and 'clip'")
        try:
            scale = [(prev, tuple(linears), tensor) for prev, linears, tensor in content["scale"]]
            result = cls(scale, [(name, tensor) for name, tensor in content["clip"]], list(content.get("report", [])))
            result._check_entries()
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not an AWQ search result: {error}") from error
        if "sha256" in content:
            from pronghorn.files.json_files import check_format, damaged

            check_format(content.get("format"), path, FORMAT)
            if content["sha256"] != result._digest(content["format"]):
                raise ValueError(damaged(path))
        return result

    def _digest(self, format: int) -> str:
        from pronghorn.files.tensor_files import digest_of

        tensors = {f"scale.{index}": scale for index, (_, _, scale) in enumerate(self.scale)}
        tensors |= {f"clip.{index}": maximum for index, (_, maximum) in enumerate(self.clip)}
        names = [[(prev, list(linears)) for prev, linears, _ in self.scale], [name for name, _ in self.clip]]
        return digest_of(tensors, [names, self.report], format)

    def _check_entries(self) -> None:
        named = [(prev, linears, scale) for prev, linears, scale in self.scale]
        named += [(name, (name,), maximum) for name, maximum in self.clip]
        for name, linears, tensor in named:
            if not isinstance(name, str) or not linears or not all(isinstance(linear, str) for linear in linears):
                raise ValueError(f"got {name!r} and {linears!r}, wanted names of modules")
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                raise ValueError(f"{name}: wanted a tensor of numbers")
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{name}: holds NaN or Inf")
        for name, _, scale in self.scale:
            if not bool((scale > 0).all()):
                raise ValueError(f"scale of {name}: holds numbers that are not positive")

    def apply(self, model: nn.Module) -> None:
        """Scale and clip the weights of a full-precision model in place; the scales alone leave its function as it is.

        Raises:
            ValueError: a name is not in the model, or a shape does not fit: the result is of another model.
        """
        self._check(model)
        for prev, linears, scale in self.scale:
            apply_scale(model, prev, linears, scale)
        with torch.no_grad():
            for name, maximum in self.clip:
                weight: Any = model.get_submodule(name).weight
                groups = weight.view(*maximum.shape[:2], -1)
                limit = maximum.to(weight)
                groups.copy_(groups.clamp(-limit, limit))

    def _check(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        wanted = {name for prev, linears, _ in self.scale for name in (prev, *linears)}
        wanted |= {name for name, _ in self.clip}
        missing = sorted(wanted - modules.keys())
        if missing:
            raise ValueError(
                f"this search result is of another model: {len(missing)} of its {len(wanted)} modules are not in "
                f"{type(model).__name__}, such as {missing[0]!r}"
            )
        for name, maximum in self.clip:
            rows, columns = modules[name].weight.shape
            if maximum.dim() != 3 or maximum.shape[0] != rows or columns % maximum.shape[1]:
                raise ValueError(
                    f"clip of {name}: shape {tuple(maximum.shape)} does not fit a [{rows}, {columns}] weight"
                )
        for prev, linears, scale in self.scale:
            for name in linears:
                weight = getattr(modules[name], "weight", None)
                if isinstance(weight, Tensor) and weight.dim() == 2 and scale.shape != weight.shape[1:]:
                    raise ValueError(
                        f"scale of {prev}: shape {tuple(scale.shape)}, but {name} has {weight.shape[1]} inputs"
                    )
        self._check_entries()


class AwqSearch:
    """Searches scales and clip maxima for every decoder block of a causal language model.

    Examples:
        >>> result = AwqSearch(AwqConfig(bits=4, group_size=128)).run(model, samples)
        >>> result.save("awq.pt")
        >>> result.apply(model)
    """

    keep_first_trial = False  # see `search_block`

    def __init__(
        self,
        config: AwqConfig,
        *,
        device: torch.device | str | None = None,
        state_dir: Path | None = None,
        anew: bool = False,
        progress: bool = True,
    ) -> None:
        self.config = config
        self.device = device
        self.state_dir = state_dir
        self.anew = anew
        self.progress = progress
        self._traced: dict[Any, list[ScaleGroup]] = {}

    def run(self, model: nn.Module, samples: Sequence[Tensor]) -> SearchResult:
        """Search the model; its experts are taken apart into linears, otherwise it is not changed.

        Args:
            model: a transformers causal language model (or one with a language tower) in fp32, bf16 or fp16.
            samples: int64 token ids [batch, tokens], one tensor a batch (`calibration_samples` makes them).

        Raises:
            ValueError: bad calibration data, NaN or Inf in weights or activations, a group size that does not divide.
        """
        blocks = self._runner(model, samples).run(self._search)
        return _collect(blocks)

    def rehearse(self, model: nn.Module, samples: Sequence[Tensor]) -> tuple[Estimate, int]:
        """What `run` will take, from the first block's search, and the bytes of its result."""
        return self._runner(model, samples).rehearse(self._search)

    def plan(self, model: nn.Module, samples: Sequence[Tensor]) -> CalibrationPlan:
        """Peak memory, time and disk of `run`, before anything starts."""
        return self._runner(model, samples).plan(self._estimate)

    def _runner(self, model: nn.Module, samples: Sequence[Tensor]) -> CalibrationRunner:
        from pronghorn.transformers.calibration import CalibrationRunner
        from pronghorn.transformers.experts import unfuse_experts

        unfuse_experts(model)
        return CalibrationRunner(
            model,
            list(samples),
            state_dir=self.state_dir,
            anew=self.anew,
            fingerprint={"awq": search_settings(self.config)},
            device=self.device,
            progress=self.progress,
        )

    def _search(self, block: Block, inputs: BlockInputs) -> BlockResult:
        linears = quantizable_linears(block.module, self.config.modules_to_not_convert, prefix=block.name)
        for name, linear in linears.items():
            self.config.check_in_features(linear.in_features, f"{block.name}.{name}")
        groups = self._groups(block, inputs, list(linears))
        try:
            found = search_block(
                block.module, inputs, groups, linears, self.config, keep_first_trial=self.keep_first_trial
            )
        except ValueError as error:
            raise ValueError(f"{block.name}: {error}") from error
        return _to_block_result(found)

    def _groups(self, block: Block, inputs: BlockInputs, linears: list[str]) -> list[ScaleGroup]:
        if self.config.scale_groups is not None:
            return _users_groups(self.config.scale_groups, block, linears)
        structure = (
            type(block.module),
            tuple((name, tuple(tensor.shape)) for name, tensor in block.module.state_dict().items()),
            tuple(linears),
        )
        if structure not in self._traced:
            hidden_states, kwargs = next(iter(inputs))
            self._traced[structure] = trace_scale_groups(block.module, hidden_states, kwargs, linears)
        return self._traced[structure]

    def _estimate(self, block: Block, tokens: int) -> tuple[float, int]:
        """FLOPs of a block's search, and the bytes it needs besides its inputs."""
        linears = quantizable_linears(block.module, self.config.modules_to_not_convert, prefix=block.name)
        weights = sum(linear.weight.numel() for linear in linears.values())
        widest = max((linear.in_features for linear in linears.values()), default=0)
        element = next(block.module.parameters()).element_size()
        flops = 2.0 * weights * tokens * (self.config.grid + 4) + (2.0 * weights * self.config.grid * 512 / 2)
        return flops, tokens * widest * element + 3 * weights * element + 4 * widest * widest


def search_settings(config: AwqConfig) -> dict[str, Any]:
    """The fields of the configuration that change what a search finds."""
    names = (
        "bits",
        "group_size",
        "zero_point",
        "duo_scaling",
        "clip",
        "grid",
        "modules_to_not_convert",
        "scale_groups",
    )
    return {name: getattr(config, name) for name in names}


def _users_groups(mapping: Sequence[dict[str, Any]], block: Block, linears: list[str]) -> list[ScaleGroup]:
    modules = dict(block.module.named_modules())
    groups = []
    for entry in mapping:
        prev, readers, inspect = entry["prev"], list(entry["linears"]), entry.get("inspect", "")
        unknown = [name for name in (prev, *readers, inspect) if name not in modules]
        if unknown:
            raise ValueError(f"scale_groups: {unknown[0]!r} is not a module of {block.name}")
        quantized = tuple(name for name in readers if name in linears)
        others = tuple(name for name in readers if name not in linears)
        groups.append(ScaleGroup(prev, quantized, others, inspect))
    return groups


def _to_block_result(found: BlockSearchResult) -> BlockResult:
    from pronghorn.transformers.calibration import BlockResult

    tensors = {f"scale.{index}": entry.scale for index, entry in enumerate(found.scales)}
    tensors |= {f"clip.{index}": maximum for index, maximum in enumerate(found.clips.values())}
    groups = [
        {
            "prev": entry.group.prev,
            "readers": list(entry.group.readers),
            "linears": list(entry.group.linears),
            "losses": entry.losses,
            "best": entry.best,
        }
        for entry in found.scales
    ]
    return BlockResult(tensors, {"groups": groups, "clip": list(found.clips), "unreached": found.unreached})


def _collect(blocks: dict[str, BlockResult]) -> SearchResult:
    result = SearchResult([], [])
    for block, found in blocks.items():
        for index, group in enumerate(found.info["groups"]):
            readers = tuple(f"{block}.{name}" for name in group["readers"])
            result.scale.append((f"{block}.{group['prev']}", readers, found.tensors[f"scale.{index}"]))
        for index, name in enumerate(found.info["clip"]):
            result.clip.append((f"{block}.{name}", found.tensors[f"clip.{index}"]))
        result.report.append({"block": block, "groups": found.info["groups"], "unreached": found.info["unreached"]})
    return result
