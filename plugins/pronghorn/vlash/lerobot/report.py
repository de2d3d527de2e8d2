"""The report and model card beside a checkpoint in which adapters are merged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig

from pronghorn.checkpoint.card import Report, write_report
from pronghorn.vlash.lerobot.configuration_vlash import VLASHConfig

USAGE = """from pronghorn.vlash.lerobot.modeling_vlash import VLASHPolicy

policy = VLASHPolicy.from_pretrained("CHECKPOINT")"""


def write_merge_report(
    folder: Path, adapters: LoraConfig, config: VLASHConfig, source: str, errors: Mapping[str, float]
) -> None:
    """Write `quality.json` and `README.md`; what LeRobot pushes to the Hub has its own card in place of this.

    Args:
        folder: of the checkpoint.
        adapters: that were merged.
        config: of the policy.
        source: folder or hub name of the weights that the adapters were put on.
        errors: by layer, what `lora.merged` found.

    Raises:
        ValueError: a merged weight is not finite; the checkpoint is there, without a card.
    """
    broken = [name for name, error in errors.items() if not math.isfinite(error)]
    if broken:
        raise ValueError(f"{broken[0]}: its weight with the adapter merged holds NaN or Inf; lower the learning rate")
    targets = adapters.target_modules
    recipe = {
        "base": config.base, "r": adapters.r, "lora_alpha": adapters.lora_alpha,
        "target_modules": targets if targets is None or isinstance(targets, str) else sorted(targets),
        "lora_quantization": config.lora_quantization,
    }  # fmt: skip
    write_report(
        folder,
        Report(
            method="VLASH, LoRA merged", source=source, library_name="lerobot", recipe=recipe,
            figures={"merged layers": len(errors), "layers": dict(errors)},
            data="the merged weights: what rounding to their dtype makes of base and adapter",
            of_layers="merged weights", usage=USAGE, tags=("vlash", "robotics", "lora"),
        ),
    )  # fmt: skip
