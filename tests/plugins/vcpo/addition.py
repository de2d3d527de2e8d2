"""A task of one digit's sums, a tokenizer of characters, and a small Llama: everything a trainer needs, in a second."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [*"0123456789+=", "<pad>", "<eos>"]
PAD, EOS = 12, 13
SMALL = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "save_strategy": "no",
         "num_generations": 4, "max_completion_length": 3, "learning_rate": 1e-2, "logging_steps": 1,
         "per_device_train_batch_size": 8, "gradient_checkpointing": False}  # fmt: skip


def tokenizer():
    """Characters to numbers."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def llama(seed=0, **changes):
    """Two layers of random weights."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, **changes}  # fmt: skip
    special = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": PAD}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **special, **sizes))


def sums():
    """All of them."""
    pairs = [(a, b) for a in range(10) for b in range(10)]
    return Dataset.from_dict({"prompt": [f"{a}+{b}=" for a, b in pairs], "answer": [str(a + b) for a, b in pairs]})


def first_digit(completions, answer, **kwargs):
    """1 where a completion begins as the answer does, and a little for every digit."""
    return [
        float(c[:1] == a[0]) + 0.1 * sum(x in "0123456789" for x in c) for c, a in zip(completions, answer, strict=True)
    ]
