"""The quality report and model card beside a checkpoint that AWQ quantized or converted."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.awq.config import AwqConfig
from pronghorn.awq.convert import read_awq_config, unpacked_tensors
from pronghorn.awq.evaluate import perplexity
from pronghorn.awq.layers import AwqLinear
from pronghorn.awq.quantize import decoder_linears
from pronghorn.checkpoint import REPORT
from pronghorn.checkpoint.card import Report, card_header, write_report
from pronghorn.estimate import Estimate, folder_bytes, now, peak_bytes, times_tried
from pronghorn.files.json_files import parse_json
from pronghorn.transformers.answers import positions_of
from pronghorn.transformers.calibration_data import builtin_text
from pronghorn.transformers.quality import USAGE, QualityReport

WINDOWS = 2
UNPACKED = ("codes", "scales", "zero points")
OF_THE_SEARCH = ("method", "n_samples", "seq_len", "grid", "clip", "duo_scaling", "scale_groups")
TAGS = ("awq", "quantized")


class AwqReport:
    """Compares a model with what it was before it was quantized.

    Args:
        model: full precision; it is asked now.
        tokenizer: its tokenizer.
        source: folder or hub name that it was loaded from.
        base_model: what the card calls it.
        search: how scales and clipping were found, as JSON.
    """

    def __init__(
        self, model: Any, tokenizer: Any, source: str, base_model: str | None, search: Mapping[str, Any]
    ) -> None:
        self.quality = QualityReport(model, tokenizer, source, base_model=base_model)
        self.search = search
        self.before = self._perplexity(model)

    def write(self, folder: Path, model: Any, config: AwqConfig, name: str | None = None) -> str:
        """Write `quality.json` and `README.md` beside the quantized model, of this name; what they say, in a line."""
        after = self._perplexity(model)
        recipe = {name: value for name, value in config.to_dict().items() if name not in OF_THE_SEARCH}
        written = self.quality.write(
            folder, model, method="AWQ", recipe={**recipe, "search": self.search},
            tags=(*TAGS, f"{config.bits}-bit"), name=name,
            figures={"perplexity of the source": self.before, "perplexity": after},
        )  # fmt: skip
        agreed, apart = written.figures["top-1 agreement"], written.figures["KL divergence, nats a token"]
        return (
            f"top-1 agreement {agreed:.4f}, KL {apart:.5f}, perplexity {self.before:.3f} -> {after:.3f}; "
            f"model card in {written.seconds:.1f} s"
        )

    def _perplexity(self, model: Any) -> float:
        window = min(512, positions_of(model.config.get_text_config().to_dict()) or 512)
        text, tokenizer = builtin_text("evaluation"), self.quality.tokenizer
        return perplexity(model, tokenizer, text, window=window, max_windows=WINDOWS, progress=False).perplexity


def write_conversion_report(source: Path, folder: Path, base_model: str | None = None, name: str | None = None) -> str:
    """Write `quality.json` and `README.md` beside a converted checkpoint; what they say, in a line.

    Both are read again and compared: codes, scales and zero points, and all that is not packed. What the source's own
    report measured is true of the new checkpoint too, and goes on.

    Args:
        source: folder that was converted.
        folder: what was made of it.
        base_model: what the card calls the full-precision model; by default what the source's card calls it.
        name: see `write_report`.
    """
    started = time.perf_counter()
    linears: list[bool] = []
    others: list[bool] = []
    for (module, parts), (old_module, old) in zip(unpacked_tensors(folder), unpacked_tensors(source), strict=True):
        equal = module == old_module and len(parts) == len(old) and all(map(torch.equal, parts, old))
        (linears if len(parts) == len(UNPACKED) else others).append(equal)
    config, path = read_awq_config(folder).to_dict(), source / REPORT
    known = parse_json(path.read_bytes(), path)["figures"] if path.is_file() else {}
    write_report(
        folder,
        Report(
            method=f"AWQ, converted to {config['version']}", source=str(source), library_name="transformers",
            recipe={name: value for name, value in config.items() if name not in OF_THE_SEARCH},
            figures={
                **known, "linears": len(linears), "linears equal bit for bit": sum(linears),
                "other tensors": len(others), "other tensors equal bit for bit": sum(others),
            },
            data="all of its tensors" + ("; figures beside those are of the source's own report" if known else ""),
            usage=USAGE, tags=(*TAGS, f"{config['bits']}-bit"),
            base_model=base_model or _base_model(source), seconds=time.perf_counter() - started,
        ),
        name,
    )  # fmt: skip
    return (
        f"{sum(linears)} of {len(linears)} linears and {sum(others)} of {len(others)} other tensors equal bit for bit"
    )


def _base_model(folder: Path) -> str | None:
    """What a checkpoint's card says that it was made from, if that is one model."""
    named = card_header(folder).get("base_model")
    names = named if isinstance(named, list) else [named]
    return names[0] if len(names) == 1 and isinstance(names[0], str) else None


def report_estimate(model: Any, tokenizer: Any, source: str, config: AwqConfig) -> Estimate:
    """What a report takes, from one of the model with a single block packed; the other blocks do as that one does."""
    # Importing the integration registers all methods, this one included: not while this room is being imported.
    from pronghorn.transformers.decoder import find_decoder_blocks

    linears = dict(decoder_linears(model, config))
    of_blocks = {
        block: {name: linear for name, linear in linears.items() if name.startswith(f"{block.name}.")}
        for block in find_decoder_blocks(model)
    }
    weights = {block: sum(linear.weight.numel() for linear in found.values()) for block, found in of_blocks.items()}
    block = max(weights, key=weights.__getitem__)
    for _ in range(times_tried(model.device)):
        started = now(model.device)
        with tempfile.TemporaryDirectory() as folder:
            with _timed(of_blocks[block].values()) as plain:
                report = AwqReport(model, tokenizer, source, None, {})
            with _packed(model, of_blocks[block], config) as layers, _timed(layers) as packed:
                report.write(Path(folder), model, config)
            written = folder_bytes(Path(folder))
        seconds = now(model.device) - started
    more = sum(packed) - sum(plain)
    seconds += more * (sum(weights.values()) / weights[block] - 1)
    return Estimate(peak_bytes(model.device), written, seconds, f"a report with one of {len(weights)} blocks packed")


@contextmanager
def _packed(model: nn.Module, linears: Mapping[str, nn.Linear], config: AwqConfig) -> Iterator[list[AwqLinear]]:
    """What these linears are within."""
    layers = {name: AwqLinear.from_linear(linear, config, name=name) for name, linear in linears.items()}
    try:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        yield list(layers.values())
    finally:
        for name, linear in linears.items():
            model.set_submodule(name, linear)


@contextmanager
def _timed(layers: Iterable[nn.Module]) -> Iterator[list[float]]:
    """Seconds of each call of a layer within."""
    started, seconds = 0.0, list[float]()

    def begin(_: nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal started
        started = now(inputs[0].device)

    def end(_: nn.Module, __: tuple[Tensor], output: Tensor) -> None:
        seconds.append(now(output.device) - started)

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(begin))
            hooks.enter_context(layer.register_forward_hook(end))
        yield seconds
