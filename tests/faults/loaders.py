"""Every loader of files that we own: a tiny file of each, and how it is read. A new method adds its entries here."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tests.models import tiny_model

LOADERS: dict[str, "Loader"] = {}


@dataclass(frozen=True)
class Loader:
    """One way from files to what runs.

    Attributes:
        write: makes the files in a folder that is there.
        read: what is loaded of them; raises where that is not what was written.
        files: what it reads, as patterns below the folder.
        unnamed: of those, what errors need not name: a message, and what the host reads before any code of ours, whose
            errors are its own.
        warns: what a log at WARNING says where something is left out: an end that a crash may have cut off, or the
            weights of a checkpoint whose configuration, to the host, no longer says that they are quantized.
        vllm: whether it imports vLLM.
        slow: whether a load takes too long for many of them in the push run.
    """

    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    files: tuple[str, ...]
    unnamed: tuple[str, ...] = ()
    warns: str = ""
    vllm: bool = False
    slow: bool = False

    def paths(self, folder: Path) -> list[Path]:
        """Files that it reads."""
        return sorted({path for pattern in self.files for path in folder.glob(pattern)})


def loader(name: str, *files: str, **options: Any) -> Callable[[type], type]:
    """Takes a class with `write(folder)` and `read(folder)` into the table."""

    def taken(kind: type) -> type:
        LOADERS[name] = Loader(kind.write, kind.read, files, **options)
        return kind

    return taken


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


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
    warns="LOAD REPORT",
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


@loader("duoattention pattern", "full_attention_heads.tsv", "config.json")
class DuoPattern:
    @staticmethod
    def write(folder):
        from pronghorn.duoattention import DuoAttentionConfig

        DuoAttentionConfig(gates=[[0.25, 0.5], [0.75, 1.0]], sparsity=0.25, sink_size=4).save_pretrained(folder)

    @staticmethod
    def read(folder):
        from pronghorn.duoattention import DuoAttentionConfig

        return DuoAttentionConfig.from_pretrained(folder).to_dict()


@loader("duoattention answers", "answers.json")
class DuoAnswers:
    @staticmethod
    def write(folder):
        from pronghorn.duoattention.kept_answers import KeptAnswers

        kept = KeptAnswers(folder / "answers.json", {"model": "m", "limit": 3})
        for number in range(3):
            kept.keep(str(number), f"answer {number}")

    @staticmethod
    def read(folder):
        from pronghorn.duoattention.kept_answers import KeptAnswers

        kept = KeptAnswers(folder / "answers.json", {"model": "m", "limit": 3})
        return [kept.get(str(number)) for number in range(3)]


def _autoencoder_sizes():
    from tests.plugins.dcae.test_autoencoder import SMALL

    widths = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4), "attention_head_dim": 4}
    return {**SMALL, **widths, "latent_channels": 4}


def _autoencoder():
    from pronghorn.dcae import AutoencoderDC, DCAEConfig

    torch.manual_seed(0)
    return AutoencoderDC(**DCAEConfig(**_autoencoder_sizes()).to_dict()).eval()


@loader("dcae, official layout", "model.safetensors", "config.json")
class DcaeOfficial:
    @staticmethod
    def write(folder):
        _autoencoder().save_efficientvit(folder, model_name="tiny")

    @staticmethod
    def read(folder):
        from pronghorn.dcae import CONFIGURATIONS, AutoencoderDC, DCAEConfig

        CONFIGURATIONS["tiny"] = DCAEConfig(**_autoencoder_sizes())
        try:
            return tensors(AutoencoderDC.from_efficientvit(folder))
        finally:
            del CONFIGURATIONS["tiny"]


@loader("dcae in diffusers", "*.safetensors", "config.json", "pronghorn.json", slow=True)
class DcaeInDiffusers:
    @staticmethod
    def write(folder):
        _autoencoder().save_pretrained(folder)

    @staticmethod
    def read(folder):
        from pronghorn.dcae import AutoencoderDC

        return tensors(AutoencoderDC.from_pretrained(folder))


@loader("dcae diffusion model", "*.safetensors", "config.json", "pronghorn.json", slow=True)
class DcaeDiffusion:
    @staticmethod
    def write(folder):
        from pronghorn.dcae.diffusers.training.models import new_model

        torch.manual_seed(0)
        model = new_model("usit", (4, 2, 2), 3, hidden_size=8, depth=2, num_attention_heads=2)
        model.save_pretrained(folder)

    @staticmethod
    def read(folder):
        from pronghorn.dcae.diffusers.uvit import UViT2DModel

        return tensors(UViT2DModel.from_pretrained(folder))


@loader("dcae latents", "one.npy")
class DcaeLatents:
    @staticmethod
    def write(folder):
        from pronghorn.dcae.latents import _write

        _write(folder / "one.npy", torch.linspace(-1, 1, 64).view(4, 4, 4).numpy())

    @staticmethod
    def read(folder):
        from pronghorn.dcae.latents import read_latent

        return read_latent(folder / "one.npy")


@loader("torchsparse plans", "plans.json")
class TorchsparsePlans:
    @staticmethod
    def write(folder):
        from pronghorn.torchsparse import ConvConfig
        from pronghorn.torchsparse.tuner import _save

        _save(folder / "plans.json", "cpu, float32", {"stride=1x1x1": ConvConfig(ifsort=True, split_mask_num=2)})

    @staticmethod
    def read(folder):
        from pronghorn.torchsparse.tuner import _config, _load

        path = folder / "plans.json"
        plans = _load(path)
        return {where: {group: _config(plan, path, where) for group, plan in groups.items()}
                for where, groups in plans.items()}  # fmt: skip


@loader("vcpo records", "vcpo_steps.jsonl", "vcpo_stats.jsonl", warns="is not whole")
class VcpoRecords:
    @staticmethod
    def write(folder):
        from tests.plugins.vcpo.test_records import write

        write(folder, [1, 2, 3], size=2)

    @staticmethod
    def read(folder):
        from pronghorn.vcpo.records import read_run

        run = read_run(folder)
        return {name: column.tolist() for table in (run.steps, run.trajectories) for name, column in table.items()}


@loader("vcpo trainer's state", "vcpo_state.json")
class VcpoState:
    @staticmethod
    def write(folder):
        from pronghorn.vcpo.trl.learner import save_state

        scaling: Any = SimpleNamespace(reference=_reference())
        scaling.reference.update(0.625, 0)
        save_state(folder, scaling, generations=17)

    @staticmethod
    def read(folder):
        from pronghorn.vcpo.trl.learner import load_state

        scaling: Any = SimpleNamespace(reference=_reference())
        state = load_state(folder, scaling, generations=int)
        return state["generations"], scaling.reference.value


def _reference():
    from pronghorn.vcpo import VCPOSettings
    from pronghorn.vcpo.ess import ReferenceESS

    return ReferenceESS(VCPOSettings())


@loader("vcpo rollouts' state", "rollout_state.json")
class VcpoRolloutState:
    @staticmethod
    def write(folder):
        from pronghorn.files.json_files import save_json

        state = {"prompt_index": 3, "beyond": [5, 6], "trained": 2, "dropped": 1, "model_version": 4}
        save_json(folder / "rollout_state.json", state, format=2)

    @staticmethod
    def read(folder):
        from pronghorn.vcpo.trl.learner import load_rollout_state

        return load_rollout_state(folder / "rollout_state.json")


@loader("trl waiting rollouts", "waiting.safetensors")
class TrlWaiting:
    @staticmethod
    def write(folder):
        from pronghorn.trl.async_rollouts import GroupBuffer
        from pronghorn.trl.rollouts import Rollout

        buffer = GroupBuffer()
        for number in range(2):
            ids = torch.arange(3) + number
            known = {"sampled": torch.ones(3, dtype=torch.bool), "sampler_log_probs": -torch.rand(3)}
            rollout = Rollout(
                ids, ids, **known, reward=0.5, advantage=0.1, group=number, policy_version=2, policy_version_end=2
            )
            buffer.add(rollout, 1)
        buffer.save(folder / "waiting.safetensors")

    @staticmethod
    def read(folder):
        from dataclasses import astuple

        from pronghorn.trl.async_rollouts import GroupBuffer

        buffer = GroupBuffer()
        buffer.load(folder / "waiting.safetensors")
        return [[astuple(rollout) for rollout in group] for group in buffer.waiting]


@loader("trl lagged sampler", "lagged_sampler.safetensors", "lagged_sampler.json")
class TrlLagged:
    @staticmethod
    def write(folder):
        from pronghorn.trl.lagged_sampler import LaggedSampler

        sampler, model = LaggedSampler(2), torch.nn.Linear(3, 2)
        for version in range(2):
            sampler._keep(model, version)
        sampler.save(folder)

    @staticmethod
    def read(folder):
        from pronghorn.trl.lagged_sampler import LaggedSampler

        sampler = LaggedSampler(2)
        sampler.load(folder, torch.nn.Linear(3, 2))
        return list(sampler._snapshots)


@loader("trl weight transfer", "model-00000.safetensors", vllm=True)
class TrlWeights:
    @staticmethod
    def write(folder):
        from pronghorn.trl.file_weight_transfer import _save

        _save(iter(tensors(torch.nn.Linear(3, 2)).items()), folder)

    @staticmethod
    def read(folder):
        from safetensors.torch import load_file

        from pronghorn.vllm.weight_files import WeightFiles

        class Worker(WeightFiles):
            model_config = SimpleNamespace(hf_text_config=SimpleNamespace(tie_word_embeddings=False))

            def reload_weights(self, weights_path):
                self.found = [load_file(path) for path in sorted(Path(weights_path).glob("*.safetensors"))]

        worker = Worker()
        worker.load_weight_files(str(folder))
        return worker.found


@loader("calibration state", "block-00000.safetensors", "fingerprint.json")
class CalibrationBlocks:
    @staticmethod
    def write(folder):
        from pronghorn.transformers.calibration_state import BlockResult, CalibrationState

        state = CalibrationState(folder, lambda: {"weights": "abc", "bits": 4})
        state.save(0, BlockResult({"scale.0": torch.rand(8)}, {"losses": [0.5, 0.25]}), 1)

    @staticmethod
    def read(folder):
        from pronghorn.transformers.calibration_state import CalibrationState

        state = CalibrationState(folder, lambda: {"weights": "abc", "bits": 4})
        found = state.load(0, torch.device("cpu"))
        return None if found is None else (found[0].tensors, found[0].info, found[1])


def _task():
    return SimpleNamespace(name="tracking", about=lambda: {"steps": 3})


@loader("vlash sweep", "rows.json")
class VlashSweep:
    @staticmethod
    def write(folder):
        from dataclasses import MISSING, fields

        from pronghorn.vlash.sweep import SweepRow, write_rows

        given: dict[str, Any] = {"mode": "vlash", "delay": 2, "seed": 0}
        wanted = {field.name: given.get(field.name, 0.5) for field in fields(SweepRow) if field.default is MISSING}
        write_rows(folder / "rows.json", _task(), [SweepRow(**wanted)])

    @staticmethod
    def read(folder):
        from pronghorn.vlash.sweep import read_rows

        return [row.to_dict() for row in read_rows(folder / "rows.json", _task())]


@loader("vlash trained policy", "tracking-plain-1-0.safetensors")
class VlashTracking:
    @staticmethod
    def write(folder):
        VlashTracking.read(folder)

    @staticmethod
    def read(folder):
        from pronghorn.vlash.tracking import TrackingTask

        return tensors(TrackingTask(folder=folder, train_steps=1).policy("plain", 0))


@loader("vlash message", "request.bin", unnamed=("request.bin",))
class VlashMessage:
    @staticmethod
    def write(folder):
        from tests.plugins.vlash.remote_calls import request_of

        from pronghorn.vlash.remote.messages import pack_request

        (folder / "request.bin").write_bytes(pack_request(request_of()))

    @staticmethod
    def read(folder):
        from pronghorn.vlash.remote.messages import unpack_request

        found = unpack_request((folder / "request.bin").read_bytes())
        return found.delay, found.state, found.leftover, dict(found.observation.content), found.observation.state
