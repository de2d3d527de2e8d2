"""Tiny random models of the families that calibration and quantization must know; two layers, 128 words."""

from collections.abc import Callable

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MHA = {**SIZES, "num_key_value_heads": 4}
GPT = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                                   "bos_token_id", "eos_token_id", "pad_token_id")}  # fmt: skip
MOE = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
MLA = {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1}

CONFIGS: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", SIZES),
    "llama_mha": ("LlamaConfig", MHA),
    "mistral": ("MistralConfig", SIZES),
    "qwen2": ("Qwen2Config", SIZES),
    "qwen3": ("Qwen3Config", {**SIZES, "head_dim": 16}),
    "qwen3_moe": ("Qwen3MoeConfig", {**SIZES, **MOE, "head_dim": 16, "num_experts": 4}),
    "qwen2_moe": ("Qwen2MoeConfig", {**SIZES, **MOE, "shared_expert_intermediate_size": 32, "num_experts": 4}),
    "mixtral": ("MixtralConfig", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma": ("GemmaConfig", {**SIZES, "head_dim": 16}),
    "gemma2": ("Gemma2Config", {**SIZES, "head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", {**SIZES, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "opt": ("OPTConfig", {**GPT, "ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 128}),
    "bloom": ("BloomConfig", GPT),
    "mpt": ("MptConfig", {"vocab_size": 128, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    "gpt_neox": ("GPTNeoXConfig", {**GPT, "intermediate_size": 96, "max_position_embeddings": 128}),
    "gpt_bigcode": ("GPTBigCodeConfig", {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4,
                                         "bos_token_id": 1, "eos_token_id": 2}),
    "falcon_7b": ("FalconConfig", {**GPT, "alibi": False}),
    "falcon_40b": ("FalconConfig", {**GPT, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "phi3": ("Phi3Config", SIZES),
    "phi3_mha": ("Phi3Config", MHA),
    "cohere": ("CohereConfig", MHA),
    "deepseek_v2": ("DeepseekV2Config", {**MHA, **MOE, **MLA, "q_lora_rank": None, "n_routed_experts": 4,
                                         "n_shared_experts": 1}),
    "deepseek_v3": ("DeepseekV3Config", {**MHA, **MOE, **MLA, "q_lora_rank": 32, "n_routed_experts": 4,
                                         "n_group": 2, "topk_group": 1}),
}  # fmt: skip


SEVEN_BILLION = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 8192,
}  # fmt: skip


def seven_billion(dtype: torch.dtype) -> PreTrainedModel:
    """The shapes of Llama-2-7B with random weights, on the GPU."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SEVEN_BILLION), dtype=dtype).eval()


def tiny_model(name: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A model whose weights are large enough that quantization and routing show."""
    kind, sizes = CONFIGS[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**sizes, **changes})).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.12)
        else:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


TINY_MODELS: dict[str, Callable[[], PreTrainedModel]] = {name: (lambda name=name: tiny_model(name)) for name in CONFIGS}


def token_ids(batch: int = 2, tokens: int = 32, seed: int = 0) -> torch.Tensor:
    """Random token ids [batch, tokens]."""
    return torch.randint(3, 128, (batch, tokens), generator=torch.Generator().manual_seed(seed))
