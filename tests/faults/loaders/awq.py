"""AWQ's checkpoints and search results: tiny files of each, and how they are read."""

import json
from pathlib import Path

import torch
from tests.faults.loaders.table import loader, tensors
from tests.models import tiny_model


def _awq_checkpoint(folder: Path) -> None:
    from pronghorn.awq import AwqConfig
    from pronghorn.awq.quantize import quantize_model
    from pronghorn.awq.transformers import mark_quantized
    from pronghorn.files.sealed import seal

    config = AwqConfig(group_size=32, method="rtn", bits=3, version="natural")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 48}
    model = tiny_model("llama", **sizes)
    quantize_model(model, config)
    mark_quantized(model, config)
    model.save_pretrained(folder, max_shard_size="12KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    seal(folder)


@loader(
    "awq in transformers",
    "*.safetensors",
    "config.json",
    "*.index.json",
    "pronghorn.json",
    unnamed=("*.index.json", "config.json"),
    warns={"config.json": "LOAD REPORT"},
    slow=True,
)
class AwqInTransformers:
    write = staticmethod(_awq_checkpoint)

    @staticmethod
    def read(folder):
        import transformers
        from transformers import AutoModelForCausalLM

        import pronghorn.transformers  # noqa: F401 - registers

        transformers.logging.enable_propagation()
        return tensors(AutoModelForCausalLM.from_pretrained(folder))


@loader("awq in vLLM", "*.safetensors", "config.json", "pronghorn.json", unnamed=("config.json",), vllm=True)
class AwqInVllm:
    write = staticmethod(_awq_checkpoint)

    @staticmethod
    def read(folder):
        """What vLLM asks of us before it loads the first weight."""
        from pronghorn.awq.vllm import VllmAwqConfig
        from pronghorn.files.json_files import parse_json

        path = folder / "config.json"
        config = VllmAwqConfig.from_config(parse_json(path.read_bytes(), path)["quantization_config"])
        config.maybe_update_config(str(folder))
        return config.config.to_dict(), config.skipped


@loader("awq convert", "*.safetensors", "config.json", "pronghorn.json")
class AwqConvert:
    write = staticmethod(_awq_checkpoint)

    @staticmethod
    def read(folder):
        from safetensors.torch import load_file

        from pronghorn.awq.convert import convert_checkpoint

        target = folder.parent / f"{folder.name}-converted"
        convert_checkpoint(folder, target, "natural", overwrite=True, progress=False)
        found = [load_file(path) for path in sorted(target.glob("*.safetensors"))]
        return found, json.loads((target / "config.json").read_text())


@loader("awq search result", "found.pt")
class AwqSearchResult:
    @staticmethod
    def write(folder):
        from pronghorn.awq.search import SearchResult

        scale = [("model.norm", ("model.q_proj", "model.k_proj"), torch.linspace(0.5, 2, 16))]
        SearchResult(scale, [("model.q_proj", torch.rand(8, 2, 1))], [{"block": "model"}]).save(folder / "found.pt")

    @staticmethod
    def read(folder):
        from pronghorn.awq.search import SearchResult

        found = SearchResult.load(folder / "found.pt")
        return found.scale, found.clip, found.report
