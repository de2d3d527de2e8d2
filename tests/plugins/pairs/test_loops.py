"""VLASH's control loop around policies that hold another method: it gives what they give when called directly."""

import threading

import pytest
import torch
from tests.models import tiny_model, token_ids
from tests.plugins.dcae.test_tiling import image
from tests.plugins.dcae.test_tiling import model as autoencoder
from tests.plugins.pairs.test_serving import SETTINGS

import pronghorn.torchsparse as ts
import pronghorn.transformers  # noqa: F401 - registers
from pronghorn.awq import AwqConfig, fuse, quantize_model
from pronghorn.dcae import accelerate_dcae
from pronghorn.duoattention import DuoAttentionConfig, apply_duo
from pronghorn.vlash import AsyncRunner, Observation, VLASHSettings

CHUNK, STEPS = 8, 6


def with_packed_weights():
    """Reads its instruction with 4-bit weights, fused."""
    model = quantize_model(tiny_model("llama"), AwqConfig(group_size=32, method="rtn"), progress=False)
    fuse(model)
    return lambda seen: model(token_ids(1, 12)).logits[0, -1] * seen.mean()


def with_streaming_heads():
    """Reads a long instruction into DuoAttention's cache."""
    model = tiny_model("llama", max_position_embeddings=512)
    duo = apply_duo(model, DuoAttentionConfig(**SETTINGS))

    def look(seen):
        cache = duo.make_cache()
        for tokens in token_ids(1, 60).split([40, 19, 1], dim=1):
            logits = model(tokens, past_key_values=cache).logits
        return logits[0, -1] * seen.mean()

    return look


def with_latents():
    """Sees its camera through an autoencoder."""
    vae = autoencoder("sana")
    accelerate_dcae(vae)
    return lambda seen: vae.encode(image(64, 64) * seen.mean()).latent.flatten()


def with_points():
    """Sees a scan by sparse convolution."""
    torch.manual_seed(0)
    layer = ts.nn.Conv3d(1, 4, 3).eval()
    places = torch.randint(0, 6, (40, 3), generator=torch.Generator().manual_seed(1)).unique(dim=0).int()
    coords = torch.cat([torch.zeros(len(places), 1, dtype=torch.int32), places], dim=1)

    def look(seen):
        return layer(ts.SparseTensor(torch.ones(len(coords), 1) * seen.mean(), coords)).feats.flatten()

    return look


METHODS = {"awq": with_packed_weights, "duoattention": with_streaming_heads, "dcae": with_latents,
           "torchsparse": with_points}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_policy_may_hold_another_method(method):
    look, calls = METHODS[method](), []

    @torch.no_grad()
    def chunk(request):
        return request.state + look(request.observation.content)[: CHUNK * 2].reshape(CHUNK, 2)

    def policy(request):
        found = chunk(request)
        calls.append((request, found, threading.current_thread() is threading.main_thread()))
        return found

    settings = VLASHSettings(chunk_size=CHUNK, n_action_steps=STEPS, inference_overlap_steps=2)
    commands = []
    with AsyncRunner(policy, settings) as runner:
        for tick in range(2 * STEPS):
            commands.append(runner.step(Observation(torch.full((3,), 1.0 + tick), torch.full((2,), float(tick)))))
            if (asked := runner.manager._asked) is not None:
                asked.pending.result()  # a loop without a clock would be too fast for any policy
        assert runner.statistics().late_chunks == 0
    assert [in_main for *_, in_main in calls] == [False] * 3
    for request, found, _ in calls:
        assert torch.equal(chunk(request), found)
    wanted = torch.cat([calls[0][1][:STEPS], calls[1][1][:STEPS]])
    assert torch.equal(torch.stack(commands), wanted)
    assert calls[0][1].std() > 0
