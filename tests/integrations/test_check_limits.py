"""`pronghorn check` of configurations that ask for the world: refused in a second, and in little memory."""

import contextlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.faults.child import run_as_program
from tests.faults.limited_memory import limited_memory
from tests.faults.memory_peak import memory_peak
from tests.models import tiny_model

SECONDS, BYTES = 1.0, 200 << 20
SAFETY = 2 << 30  # so that a check without bounds fails instead of this machine

LLAMA = {
    "many labels": {"num_labels": 3_000_000},
    "more labels": {"num_labels": 10**8},
    "labels within the numbers": {"num_labels": 70_000},
    "head": {"head_dim": 500_000},
    "head of a float": {"head_dim": 1e9},
    "experts": {"num_local_experts": 10**8},
    "experts within the numbers": {"num_local_experts": 70_000},
    "inside": {"text_config": {"vision": [{"hidden_size": 10**9}]}},
    "many items": {"hidden_sizes": [1] * 10**6},
    "together": {"head_dim": 70_000},
    "positions": {"max_position_embeddings": 10**12},
}
AUTOENCODER = {
    "layers": {"layers_per_block": 10**7},
    "channels": {"block_out_channels": [10**9]},
    "together": {"block_out_channels": [7000]},
}
TOGETHER = "the configuration means a model of"  # what no single number tells

# What real configurations hold, most of it beyond the 78,000 numbers of the tiny model.
NO_SIZES = {
    "bos_token_id": 128_000, "eos_token_id": [128_001, 128_008, 128_009], "image_token_index": 262_144,
    "max_position_embeddings": 1_048_576, "sliding_window": 131_072, "max_window_layers": 28, "seed": 2**32 - 1,
    "rope_scaling": {"factor": 8.0, "original_max_position_embeddings": 131_072, "rope_type": "llama3"},
    "rope_theta": 10_000_000.0, "rope_local_base_freq": 100_000.0, "rotary_emb_base": 100_000,
    "scheduler_decay_steps": 10**6, "sampling_rate": 96_000, "suppress_tokens": [220, 257_000], "num_classes": 527,
    "id2label": {str(i): f"LABEL_{i}" for i in range(1000)}, "attention_chunk_size": 131_072,
    "gradient_clipping": 1e10, "pad_val": 1123581321.0,
    "quantization_config": {"bits": 4, "group_size": 128, "llm_int8_threshold": 6.0},
}  # fmt: skip


def save_llama(folder):
    tiny_model("llama").save_pretrained(folder)


def save_autoencoder(folder):
    import diffusers

    torch.manual_seed(0)
    diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, sample_size=32).save_pretrained(folder)


CHECKPOINTS = {"transformers": (save_llama, LLAMA), "diffusers": (save_autoencoder, AUTOENCODER)}


def measured(folder, ecosystem):
    """Seconds of work, bytes at the peak above those before, and what failed."""
    from pronghorn.cli.check import check

    peak, start = memory_peak(), time.process_time()
    failed = [one.detail for one in check(folder, ecosystem) if one.state == "failed"]
    return {"seconds": time.process_time() - start, "bytes": peak(), "failed": failed}


def main(ecosystem, root):
    save, hostile = CHECKPOINTS[ecosystem]
    save(root / "whole")
    found = {"whole": measured(root / "whole", ecosystem)}
    for name, changes in hostile.items():
        folder = shutil.copytree(root / "whole", root / name)
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        with limited_memory(SAFETY):
            found[name] = measured(folder, ecosystem)
    return found


@pytest.mark.fault(3)
@pytest.mark.parametrize("ecosystem", CHECKPOINTS)
def test_what_asks_for_the_world_is_refused_at_once(tmp_path, ecosystem, figure):
    pytest.importorskip(ecosystem, reason=f"the {ecosystem} extra is not installed")
    found = run_as_program(__file__, ecosystem, tmp_path, seconds=200)
    assert found.pop("whole")["failed"] == []
    hostile = CHECKPOINTS[ecosystem][1]
    assert found.keys() == hostile.keys()
    for name, one in found.items():
        named = TOGETHER if name == "together" else "the configuration says"
        assert len(one["failed"]) == 1, (name, one)
        assert named in one["failed"][0], (name, one)
        assert one["seconds"] < SECONDS, (name, one)
        assert one["bytes"] < BYTES, (name, one)
    figure("largest memory", max(one["bytes"] for one in found.values()))


def test_numbers_that_are_no_sizes_pass(tmp_path):
    from pronghorn.checkpoint import Checkpoint
    from pronghorn.checkpoint.weights import check_weights

    save_llama(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **NO_SIZES}))
    assert {one.state for one in check_weights(Checkpoint(tmp_path, "transformers"))} == {"ok"}


def test_a_tensor_without_numbers_makes_no_room(tmp_path):
    from pronghorn.checkpoint.sizes import check_sizes

    (tmp_path / "config.json").write_text('{"hidden_size": 64, "num_heads": 9}')
    weights = tmp_path / "model.safetensors"
    assert check_sizes(tmp_path, {weights: [(64, 64)]}).state == "ok"
    assert check_sizes(tmp_path, {weights: [(8, 4), (10**12, 0)]}).state == "failed"


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    with contextlib.redirect_stdout(sys.stderr):
        done = main(sys.argv[1], Path(sys.argv[2]))
    print(json.dumps(done))  # noqa: T201 - what run_as_program reads
