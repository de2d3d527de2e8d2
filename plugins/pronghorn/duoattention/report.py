"""The quality report and model card beside a model that was saved with its pattern."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from pronghorn.duoattention.config import DuoAttentionConfig
from pronghorn.duoattention.transformers import DuoAttention, apply_duo
from pronghorn.estimate import Estimate, folder_bytes, now, peak_bytes, tensor_bytes, times_tried
from pronghorn.transformers.quality import QualityReport

WINDOWS = 3  # windows of streaming heads that a text is long: what they forget must show
USAGE = """from transformers import AutoModelForCausalLM, AutoTokenizer

from pronghorn.duoattention import DuoAttentionConfig, apply_duo

model = AutoModelForCausalLM.from_pretrained("CHECKPOINT")
tokenizer = AutoTokenizer.from_pretrained("CHECKPOINT")
duo = apply_duo(model, DuoAttentionConfig.from_pretrained("CHECKPOINT/duoattention"))
output = model.generate(**tokenizer("Hello", return_tensors="pt"), past_key_values=duo.make_cache())"""


class DuoReport:
    """Compares answers through DuoAttention's cache with those of the model as it was.

    Args:
        model: as it was; it is asked now.
        tokenizer: its tokenizer.
        config: which heads stream, and what they keep.
        source: folder or hub name that it was loaded from.
        base_model: what the card calls it.
    """

    def __init__(
        self, model: Any, tokenizer: Any, config: DuoAttentionConfig, source: str, base_model: str | None
    ) -> None:
        length = WINDOWS * config.window
        self.quality = QualityReport(model, tokenizer, source, base_model=base_model, length=length)

    def write(self, folder: Path, duo: DuoAttention, name: str | None = None) -> str:
        """Write `quality.json` and `README.md` beside the model, of this name; what they say, in a line."""
        config, heads = duo.config, [full for layer in duo.full_heads for full in layer]
        recipe = {name: value for name, value in config.to_dict().items() if name != "gates"}
        written = self.quality.write(
            folder, duo.model, method="DuoAttention", recipe=recipe, tags=("duoattention", "kv-cache"),
            seed=config.seed, figures={"full key/value heads": sum(heads), "key/value heads": len(heads)},
            usage=USAGE, make_cache=duo.make_cache, chunk=max(1, config.recent_size // 2), name=name,
        )  # fmt: skip
        agreed, apart = written.figures["top-1 agreement"], written.figures["KL divergence, nats a token"]
        return f"top-1 agreement {agreed:.4f}, KL {apart:.5f}; model card in {written.seconds:.1f} s"


def application_estimate(
    model: Any, tokenizer: Any, config: DuoAttentionConfig, source: str, *, with_report: bool = True
) -> Estimate:
    """What reordering a model, its report and saving both take: all is done but the saving, which has no time here."""
    device = model.device
    started = now(device)
    report = DuoReport(model, tokenizer, config, source, None) if with_report else None
    duo = apply_duo(model, config, reorder=True)
    weights = list(model.state_dict().values())
    for weight in weights:
        weight.sum()  # saving reads all of them; until then files are but mapped
    written = tensor_bytes(weights)
    seconds = now(device) - started
    if report is not None:
        for _ in range(times_tried(device)):
            started = now(device)
            with tempfile.TemporaryDirectory() as folder:
                report.write(Path(folder), duo)
                of_report = folder_bytes(Path(folder))
            after = now(device) - started
        written, seconds = written + of_report, seconds + after
    return Estimate(peak_bytes(device), written, seconds, "all but the saving was done")
