"""A tiny model that can chat."""

import pytest
from tests.models import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}|{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def letters_tokenizer():
    """One token a letter."""
    characters = [chr(code) for code in range(32, 127)]
    vocabulary = {letter: index for index, letter in enumerate(["<unk>", *characters])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="~")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def letters(tmp_path_factory):
    """A tiny model with a tokenizer of one token a letter, saved."""
    folder = tmp_path_factory.mktemp("letters")
    letters_tokenizer().save_pretrained(folder)
    tiny_model("llama").save_pretrained(folder)
    return folder
