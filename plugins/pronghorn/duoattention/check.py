"""What only DuoAttention can say of a checkpoint before it is shipped: its gates, and what it says with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pronghorn.checkpoint import Checkpoint, Finding, failed, ok
from pronghorn.duoattention.config import DuoAttentionConfig

SERVED = ("gates", "sparsity", "threshold", "balance", "seed", "sink_size", "recent_size", "decode_window")
FOLDER = "duoattention"
REMEDY = "find the pattern of this model (`pronghorn duoattention find`) and apply it again"
PROMPT, NEW_TOKENS = 8, 8


def check_files(checkpoint: Checkpoint) -> Iterator[Finding]:
    """The gates that `pronghorn duoattention apply` saved beside a model; nothing for others."""
    config = _config(checkpoint)
    if isinstance(config, ValueError | TypeError | OSError):
        yield failed("DuoAttention gates", str(config), REMEDY)
    if not isinstance(config, DuoAttentionConfig):
        return
    full = config.full_heads() or []
    text = checkpoint.text_config
    wanted = (
        text.get("num_hidden_layers"), text.get("num_key_value_heads") or text.get("num_attention_heads")
    )  # fmt: skip
    found = (len(full), len(full[0]))
    if found != wanted:
        detail = (
            f"they are for {found[0]} layers of {found[1]} key/value heads, the model has {wanted[0]} of {wanted[1]}"
        )
        yield failed("DuoAttention gates", detail, REMEDY)
        return
    kept = sum(map(sum, full))
    yield ok("DuoAttention gates", f"{kept} of {found[0] * found[1]} key/value heads are full")


def check_loaded(checkpoint: Checkpoint, model: Any) -> Iterator[Finding]:
    """That the model answers with its pattern, in transformers."""
    config = _config(checkpoint)
    if not isinstance(config, DuoAttentionConfig):
        return
    import torch

    from pronghorn.duoattention.transformers import apply_duo

    before = model.config._attn_implementation
    try:
        cache = apply_duo(model, config).make_cache()
        said: list[int] = []
        tokens = torch.arange(PROMPT, device=model.device)[None] % checkpoint.text_config["vocab_size"]
        with torch.no_grad():
            for _ in range(NEW_TOKENS):
                logits = model(tokens, past_key_values=cache, use_cache=True).logits[:, -1:]
                if not bool(logits.isfinite().all()):
                    yield failed("DuoAttention answers", f"logits hold NaN or Inf after {said}", REMEDY)
                    return
                tokens = logits.argmax(-1)
                said.append(int(tokens))
    finally:
        model.set_attn_implementation(before)
    yield ok("DuoAttention answers", f"finite, generated ids {said}")


def vllm_options(checkpoint: Checkpoint) -> dict[str, Any]:
    """The model's own architecture with its heads split as the gates beside it say; nothing for others.

    In vLLM prompts are masked from the first token on, by tokens, and caches are not quantized, whatever is saved.
    """
    config = _config(checkpoint)
    if not isinstance(config, DuoAttentionConfig):
        return {}
    from pronghorn.duoattention.vllm import PREFIX

    architectures = [f"{PREFIX}{name}" for name in checkpoint.config.get("architectures") or []]
    settings = {name: value for name, value in config.to_dict().items() if name in SERVED}
    return {"hf_overrides": {"architectures": architectures}, "additional_config": {"duoattention": settings}}


def _config(checkpoint: Checkpoint) -> DuoAttentionConfig | Exception | None:
    if not (checkpoint.folder / FOLDER).is_dir():
        return None
    try:
        return DuoAttentionConfig.from_pretrained(checkpoint.folder / FOLDER)
    except (ValueError, TypeError, OSError) as error:
        return error
