"""DuoAttention in vLLM: streaming heads give back the memory between their first tokens and their last ones.

    vllm serve MODEL --hf-overrides '{"architectures": ["DuoAttentionLlamaForCausalLM"]}' \\
        --additional-config '{"duoattention": {"pattern": "PATTERN", "sparsity": 0.5, "balance": "per_layer"}}'

The architecture is the model's own, with `DuoAttention` in front of its name. The settings are `pattern`, a folder or
the name of a published one, or `gates`, a table; and the attributes of `DuoAttentionConfig`.

A streaming head of token i sees token j <= i if j < sink_size or j > i - window, where window is recent_size + 1 with
`decode_window="reference"`, the default, and recent_size with "mask"; prompts are no exception. So tokens depend
neither on chunks nor on what else is in the batch, and equal those of the authors' code fed token by token.
"""

from __future__ import annotations

PREFIX = "DuoAttention"


def register() -> None:
    """Make vLLM's causal language models known with `DuoAttention` in front of their names; again is a no-op."""
    from vllm.model_executor.models import ModelRegistry

    known = set(ModelRegistry.get_supported_archs())
    for architecture in sorted(known):
        name = PREFIX + architecture
        if architecture.endswith("ForCausalLM") and not architecture.startswith(PREFIX) and name not in known:
            ModelRegistry.register_model(name, f"{__name__}.models:{name}")
