"""Two models of a method at once, each of another configuration and in several threads: what each gives alone."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from tests.models import tiny_model, token_ids

THREADS, CALLS = 3, 4  # of each model, and of each thread


def of_awq(tmp_path):
    """Logits and tokens of a Llama, quantized while it is loaded."""
    from transformers import AutoModelForCausalLM

    import pronghorn.transformers  # noqa: F401 - registers
    from pronghorn.awq import AwqConfig

    for seed, settings in enumerate(({"bits": 4, "version": "gemm"}, {"bits": 3, "version": "natural"})):
        tiny_model("llama_mha", seed).save_pretrained(tmp_path / str(seed))
        config = AwqConfig(method="rtn", group_size=32, **settings)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(seed), quantization_config=config)

        def run(number, model=model):
            ids = token_ids(seed=number)
            return model(ids).logits, model.generate(ids[:1], max_new_tokens=8, do_sample=False)

        yield run


def of_duoattention(tmp_path):
    """Logits of a chunked prefill and greedy tokens, each call with a cache of its own, one of them static."""
    from pronghorn.duoattention import DuoAttentionConfig, apply_duo

    for seed, gates in enumerate(([[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]])):
        config = DuoAttentionConfig(gates=gates, threshold=0.5, sink_size=2 + seed, recent_size=6 + seed)
        duo = apply_duo(tiny_model("llama", seed), config)

        def run(number, duo=duo, static=bool(seed)):
            ids = token_ids(1, seed=number)
            cache = duo.make_cache(static=static, max_len=40 if static else None)
            logits = [duo.model(chunk, past_key_values=cache).logits for chunk in ids.split([20, 11, 1], dim=1)]
            cache = duo.make_cache(static=static, max_len=40 if static else None)
            return *logits, duo.model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)

        yield run


def of_torchsparse(tmp_path):
    """Features of all stages of a U-Net, whose kernel maps are made anew for each cloud."""
    from pronghorn.torchsparse import SparseTensor, backbones

    sizes = (1, 12, 11, 13)
    for seed, widths in enumerate(((8, [8, 16], [16, 8]), (4, [8], [8]))):
        torch.manual_seed(seed)
        model = backbones.SparseResUNet(*widths, in_channels=4).eval()

        def run(number, model=model):
            generator = torch.Generator().manual_seed(number)
            places = torch.randperm(torch.Size(sizes).numel(), generator=generator)[: 200 + number]
            coords = torch.stack(torch.unravel_index(places, sizes), dim=1).int()
            cloud = SparseTensor(torch.randn(len(coords), 4, generator=generator), coords, spatial_range=sizes)
            return [part for found in model(cloud) for part in (found.feats, found.coords)]

        yield run


@pytest.mark.fault(22)
@pytest.mark.parametrize("models", [of_awq, of_duoattention, of_torchsparse])
def test_two_models_in_threads_give_what_each_gives_alone(models, tmp_path, figure):
    runs = [*models(tmp_path)]
    together = Barrier(len(runs) * THREADS)

    @torch.inference_mode()  # of a thread
    def called(thread):
        run = runs[thread % len(runs)]
        together.wait(60)
        return [run(number) for number in range(thread, thread + CALLS)]

    with torch.inference_mode():
        alone = [[run(number) for number in range(len(runs) * THREADS + CALLS)] for run in runs]
    assert not any(torch.equal(one[0], other[0]) for one, other in zip(*alone, strict=True))  # two models indeed
    with ThreadPoolExecutor(together.parties) as pool:
        for thread, found in enumerate(pool.map(called, range(together.parties))):
            wanted = alone[thread % len(runs)][thread : thread + CALLS]
            for ours, theirs in zip(found, wanted, strict=True):
                assert all(map(torch.equal, ours, theirs))
    figure("calls at once", together.parties)
    figure("calls", together.parties * CALLS)
