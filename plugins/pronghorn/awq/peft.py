"""LoRA on top of packed linears, through peft."""

from __future__ import annotations

from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear

from pronghorn.awq.layers import AwqLinear


def prepare_lora(config: LoraConfig) -> LoraConfig:
    """Tell a LoRA configuration what to do with `AwqLinear`s; returns it.

    peft keeps this with each configuration, not in a registry, and does not save it: give it the configuration of a
    saved adapter too (`PeftModel.from_pretrained(model, path, config=prepare_lora(LoraConfig.from_pretrained(path)))`).

    Examples:
        >>> model = get_peft_model(model, prepare_lora(LoraConfig(target_modules=["q_proj", "v_proj"])))
    """
    config._register_custom_module({AwqLinear: LoraAwqLinear})
    return config


class LoraAwqLinear(LoraLinear):
    """A LoRA adapter beside a packed linear; it cannot be merged into codes."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise ValueError("an adapter cannot be merged into a packed weight: dequantize the model first")
