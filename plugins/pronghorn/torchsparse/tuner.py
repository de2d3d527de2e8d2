"""The sparse autotuner: tries, in the model, how each group of layers that share a kernel map computes fastest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from pronghorn.files.json_files import load_json, save_json
from pronghorn.torchsparse.config import DATAFLOWS, FETCH_ON_DEMAND, GATHER_SCATTER, IMPLICIT_GEMM, ConvConfig
from pronghorn.torchsparse.defaults import settings
from pronghorn.torchsparse.fusion import FusedConvolution
from pronghorn.torchsparse.graphs import cuda_graph
from pronghorn.torchsparse.nn.convolution import SparseConvolution
from pronghorn.torchsparse.tensor import SparseTensor, TensorCache

SPLITS = (1, 2, 3, 4)
TYPICAL_SPLITS = 3
EPSILONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
THRESHOLDS = (0, *range(5000, 25001, 2500))
FORMAT = 2  # of the file of plans
WARM_UP = 10  # runs before the first that is timed
OUTLIER = 5  # times the mean: something else ran
Group = tuple[Any, ...]
Times = list[tuple[float, float]]  # seconds forward and backward of each run


def tune(
    model: nn.Module,
    data_loader: Iterable[Any],
    *,
    n_samples: int = 10,
    collect_fn: Callable[[Any], Any] = lambda batch: batch,
    dataflow_range: Sequence[str] = (IMPLICIT_GEMM,),
    dataflow_prune: bool = False,
    tune_with_bwd: bool = False,
    graph: bool = False,
    cache: str | Path | None = None,
    force_retune: bool = False,
    verbose: bool = True,
) -> dict[str, ConvConfig]:
    """Find and set the configuration of every convolution that has a kernel map.

    Layers that share a map share a configuration. One group after the other tries all candidates while the others have
    what was found for them so far, and the whole model is timed, maps and all. What is found must be faster than the
    default in a run of its own, or the default stays.

    Args:
        model: on the device that it will run on.
        data_loader: of samples like those that it will see.
        n_samples: how many of them to try.
        collect_fn: makes the model's input of a sample.
        dataflow_range: dataflows to try.
        dataflow_prune: of each group, try one or two candidates of each dataflow first, and the others of the fastest
            dataflow only.
        tune_with_bwd: time training steps: forward and backward splits are chosen by their own times.
        graph: time the model as it runs by `cuda_graph`, for which every candidate is recorded: on a GPU that the host
            keeps waiting, nothing else tells how long the GPU takes.
        cache: a JSON file, by GPU and dtype. What it holds of this model is taken over, and what is found added.
        force_retune: try again, whatever the file holds.
        verbose: show progress.

    Returns:
        The configuration of each layer, by name.

    Raises:
        ValueError: no samples, no convolution with a map, an unknown dataflow, or a damaged file.

    Source: Tang et al. (MICRO 2023), section 4.
    """
    unknown = [name for name in dataflow_range if name not in DATAFLOWS]
    if unknown or not dataflow_range:
        raise ValueError(f"dataflow_range: got {list(dataflow_range)}, accepted are {', '.join(DATAFLOWS)}")
    samples = [collect_fn(sample) for sample in islice(data_loader, n_samples)]
    if not samples:
        raise ValueError(f"data_loader, n_samples: no samples, of {n_samples}")
    groups = _groups(model, samples[0])
    if not groups:
        raise ValueError("model: has no convolution with a kernel map")
    where = _place(model)
    known = {} if force_retune else _load(cache).get(where, {})
    names = {name: _text(group) for group, layers in groups.items() for name in layers}
    if all(group in known for group in names.values()):
        found = {_text(group): _config(known[_text(group)], cache, where) for group in groups}
    else:
        run = _Run(model, samples, tune_with_bwd, graph)
        found = _search(run, groups, list(dataflow_range), verbose, dataflow_prune)
        _save(cache, where, found)
    _set(model, {name: found[group] for name, group in names.items()})
    return {name: found[group] for name, group in names.items()}


def candidates(dataflows: Sequence[str], *, backward: bool) -> list[ConvConfig]:
    """What is tried, the default first."""
    default = settings.config
    result = [default]
    if IMPLICIT_GEMM in dataflows:
        result.append(replace(default, dataflow=IMPLICIT_GEMM, ifsort=False))
        for splits in SPLITS:
            result.append(replace(default, dataflow=IMPLICIT_GEMM, ifsort=True, split_mask_num=splits,
                                  split_mask_num_bwd=splits if backward else default.split_mask_num_bwd))  # fmt: skip
    if FETCH_ON_DEMAND in dataflows:
        result.append(replace(default, dataflow=FETCH_ON_DEMAND))
    if GATHER_SCATTER in dataflows:
        result += [replace(default, dataflow=GATHER_SCATTER, epsilon=epsilon, mm_thresh=rows)
                   for epsilon in EPSILONS for rows in THRESHOLDS]  # fmt: skip
    return list(dict.fromkeys(result))


class _Run:
    """The model on the samples, timed."""

    def __init__(self, model: nn.Module, samples: list[Any], backward: bool, graph: bool = False) -> None:
        self.model, self.samples, self.backward, self.graph = model, samples, backward, graph
        self.forward: Callable[[Any], Any] = model
        self.warm = False

    def __call__(self, configs: dict[str, ConvConfig]) -> Times:
        """Seconds forward and backward on each sample, with these configurations of layers."""
        _set(self.model, configs)
        self.forward = cuda_graph(self.model) if self.graph else self.model
        for _ in range(1 if self.warm else WARM_UP):  # the first run of a configuration compiles
            self._once(self.samples[0])
        self.warm = True
        return [self._once(sample) for sample in self.samples]

    def _once(self, sample: Any) -> tuple[float, float]:
        with torch.set_grad_enabled(self.backward):
            given = torch.utils._pytree.tree_map(_forgotten, sample, is_leaf=_is_sparse)
            start = _now()
            output = self.forward(given)
            middle = _now()
            if self.backward:
                parts = [part.feats for part in _tensors(output) if part.feats.requires_grad]
                torch.autograd.backward(parts, [torch.ones_like(part) for part in parts])
                self.model.zero_grad(set_to_none=True)
        return middle - start, _now() - middle


def _search(
    run: _Run, groups: dict[Group, list[str]], dataflows: list[str], verbose: bool, prune: bool
) -> dict[str, ConvConfig]:
    tried = candidates(dataflows, backward=run.backward)
    default = {name: settings.config for layers in groups.values() for name in layers}
    chosen = dict(default)
    found = {}
    with tqdm(total=len(groups) * len(tried), desc="tuning", disable=not verbose) as bar:
        for group, layers in groups.items():
            times: dict[ConvConfig, Times] = {}
            for config in _worth_trying(tried, times, prune):
                times[config] = run({**chosen, **dict.fromkeys(layers, config)})
                bar.update()
            found[_text(group)] = _fastest(times)
            chosen.update(dict.fromkeys(layers, found[_text(group)]))
    if _total(run(chosen)) >= _total(run(default)):
        return dict.fromkeys(found, settings.config)
    return found


def _worth_trying(tried: list[ConvConfig], times: dict[ConvConfig, Times], prune: bool) -> Iterator[ConvConfig]:
    """All, or what is typical of each dataflow, and then the others of the one whose `times` are best."""
    if not prune:
        yield from tried
        return
    for dataflow in {config.dataflow: None for config in tried}:
        of_it = [config for config in tried if config.dataflow == dataflow]
        yield of_it[0]
        yield from [config for config in of_it[1:] if config.ifsort and config.split_mask_num == TYPICAL_SPLITS]
    best = min(times, key=lambda config: _total(times[config])).dataflow
    yield from [config for config in tried if config.dataflow == best and config not in times]


def _fastest(times: dict[ConvConfig, Times]) -> ConvConfig:
    """The best, of sorted ones with the forward and the backward splits that are each the best."""
    best = min(times, key=lambda config: _total(times[config]))
    if not best.ifsort or best.split_mask_num != best.split_mask_num_bwd:
        return best
    split = {config: taken for config, taken in times.items() if config.ifsort}
    backward = min(split, key=lambda config: _mean([taken[1] for taken in split[config]]))
    forward = min(split, key=lambda config: _mean([taken[0] for taken in split[config]]))
    return replace(forward, split_mask_num_bwd=backward.split_mask_num_bwd)


def _total(times: Times) -> float:
    return _mean([forward + backward for forward, backward in times])


def _mean(values: list[float]) -> float:
    usual = OUTLIER * mean(values)
    return mean(value for value in values if value <= usual)


def _groups(model: nn.Module, sample: Any) -> dict[Group, list[str]]:
    """Names of layers by what their kernel map depends on, as one run finds it."""
    groups: dict[Group, list[str]] = {}

    def record(name: str, layer: SparseConvolution, given: SparseTensor) -> None:
        if layer.kernel_volume == 1:
            return
        stride = given.stride
        if layer.transposed and not layer.generative:  # the map is that of the way down
            stride = tuple(a // b for a, b in zip(stride, layer.stride, strict=True))
        group = stride, layer.kernel_size, layer.stride, layer.dilation
        if name not in groups.setdefault(group, []):
            groups[group].append(name)

    layers: dict[str, tuple[nn.Module, SparseConvolution]] = {}  # what is called, and the convolution
    for name, module in model.named_modules():
        if isinstance(module, FusedConvolution):
            layers[f"{name}.conv"] = module, module.conv
        elif isinstance(module, SparseConvolution):
            layers.setdefault(name, (module, module))
    hooks = [
        called.register_forward_pre_hook(lambda _, given, name=name, layer=layer: record(name, layer, given[0]))
        for name, (called, layer) in layers.items()
    ]
    try:
        with torch.no_grad():
            model(torch.utils._pytree.tree_map(_forgotten, sample, is_leaf=_is_sparse))
    finally:
        for hook in hooks:
            hook.remove()
    return groups


def _set(model: nn.Module, configs: dict[str, ConvConfig]) -> None:
    for name, config in configs.items():
        layer: Any = model.get_submodule(name)
        layer.config = config


def _is_sparse(value: Any) -> bool:
    return isinstance(value, SparseTensor)


def _forgotten(value: Any) -> Any:
    """A tensor whose maps are to be found anew."""
    if not _is_sparse(value):
        return value
    made = value.replace(value.feats)
    made._caches = TensorCache({made.stride: (made.coords, made.spatial_range)})
    return made


def _tensors(output: Any) -> list[SparseTensor]:
    return [part for part in torch.utils._pytree.tree_leaves(output, is_leaf=_is_sparse) if _is_sparse(part)]


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _place(model: nn.Module) -> str:
    first = next(model.parameters())
    name = torch.cuda.get_device_name(first.device) if first.device.type == "cuda" else first.device.type
    return f"{name}, {str(first.dtype).removeprefix('torch.')}"


def _text(group: Group) -> str:
    return " ".join(f"{name}={'x'.join(map(str, value))}" for name, value in
                    zip(("stride", "kernel", "step", "dilation"), group, strict=True))  # fmt: skip


def _load(cache: str | Path | None) -> dict[str, Any]:
    path = None if cache is None else Path(cache)
    if path is None or not path.exists():
        return {}
    content = load_json(path, newest=FORMAT)
    plans = content.get("plans", content) if isinstance(content, dict) else None
    if not isinstance(plans, dict) or not all(isinstance(plan, dict) for plan in plans.values()):
        raise ValueError(f"{path}: wanted what `tune` wrote: configurations by device and by group of layers")
    return plans


def _config(values: Any, cache: Any, where: str) -> ConvConfig:
    try:
        return ConvConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{cache}: {where}: {error}; delete the file, or set force_retune") from error


def _save(cache: str | Path | None, where: str, found: dict[str, ConvConfig]) -> None:
    if cache is None:
        return
    path, content = Path(cache), _load(cache)
    content.setdefault(where, {}).update({group: config.to_dict() for group, config in found.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_json(path, {"plans": content}, format=FORMAT)
