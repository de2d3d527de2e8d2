"""The calibration runner: the right inputs for every block, and clear words about bad data."""

import itertools

import pytest
import torch
from tests.faults.fail_at_call import FailAtCall
from tests.models import CONFIGS, SIZES, tiny_model, token_ids

from pronghorn.transformers.activation_store import ActivationStore
from pronghorn.transformers.calibration import BlockResult, CalibrationRunner
from pronghorn.transformers.calibration_capture import BlockCalls
from pronghorn.transformers.calibration_data import builtin_text, calibration_samples
from pronghorn.transformers.decoder import find_decoder_blocks
from pronghorn.transformers.experts import unfuse_experts


def outputs(block, inputs):
    found = [block.module(hidden, **kwargs) for hidden, kwargs in inputs]
    found = [output if isinstance(output, torch.Tensor) else output[0] for output in found]
    return BlockResult({"out": torch.cat(found)}, {"block": block.name})


def tiny_llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=28, patch_size=14)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_index=1)
    return LlavaForConditionalGeneration(config).eval()


def tiny_qwen2_vl():
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
    text = {**SIZES, "rope_parameters": rope}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=1, video_token_id=2)
    return Qwen2VLForConditionalGeneration(config).eval()


MULTIMODAL = {"llava": tiny_llava, "qwen2_vl": tiny_qwen2_vl}


@pytest.mark.parametrize("family", MULTIMODAL)
def test_only_the_language_tower_is_found(family):
    names = [block.name for block in find_decoder_blocks(MULTIMODAL[family]())]
    assert names == ["model.language_model.layers.0", "model.language_model.layers.1"]


@pytest.mark.parametrize("family", [*CONFIGS, *MULTIMODAL])
def test_blocks_get_what_the_model_gives_them(family):
    model = MULTIMODAL[family]() if family in MULTIMODAL else tiny_model(family)
    samples = [token_ids(2, 24), token_ids(1, 17, seed=1)]
    seen = {}
    for block in find_decoder_blocks(model):
        block.module.register_forward_hook(
            lambda module, args, output, name=block.name: seen.setdefault(name, []).append(
                output if isinstance(output, torch.Tensor) else output[0]
            )
        )
    with torch.no_grad():
        for ids in samples:
            model(ids, use_cache=False)
    wanted = {name: list(values) for name, values in seen.items()}

    def check(block, inputs):
        got = [block.module(hidden, **kwargs) for hidden, kwargs in inputs]
        for ours, theirs in zip(got, wanted[block.name], strict=True):
            ours = ours if isinstance(ours, torch.Tensor) else ours[0]
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        return BlockResult({})

    assert list(CalibrationRunner(model, samples, progress=False).run(check)) == list(wanted)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "qwen2_moe"])
def test_experts_apart_compute_the_same(family):
    model, ids = tiny_model(family), token_ids()
    with torch.no_grad():
        before = model(ids).logits
        names = unfuse_experts(model)
        after = model(ids).logits
    assert names
    assert not unfuse_experts(model)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_a_transformed_block_feeds_the_next():
    model, samples = tiny_model("llama"), [token_ids()]
    plain = CalibrationRunner(model, samples, progress=False).run(outputs)

    def zero(block, result):
        for parameter in block.module.parameters():
            parameter.data.zero_()

    changed = CalibrationRunner(model, samples, progress=False).run(outputs, zero)
    first, last = plain
    assert torch.equal(plain[first].tensors["out"], changed[first].tensors["out"])
    assert not torch.equal(plain[last].tensors["out"], changed[last].tensors["out"])


def test_activations_beyond_the_budget_go_to_disk(tmp_path):
    store = ActivationStore(100, tmp_path)
    tensors = [torch.randn(3, 5) for _ in range(4)]
    for tensor in tensors:
        store.append(tensor)
    assert store.spilled == 3 * 60
    assert all(torch.equal(a, b) for a, b in zip(store, tensors, strict=True))
    assert not list(tmp_path.iterdir())  # the files have no names: nothing can be left behind


def test_spilled_runs_give_the_same_bits(tmp_path):
    model, samples = tiny_model("llama"), [token_ids(seed=s) for s in range(3)]
    kept = CalibrationRunner(model, samples, progress=False).run(outputs)
    spilled = CalibrationRunner(model, samples, progress=False, activation_budget=0, state_dir=tmp_path).run(outputs)
    assert all(torch.equal(kept[name].tensors["out"], spilled[name].tensors["out"]) for name in kept)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"fingerprint.json", "block-00000.safetensors", "block-00001.safetensors"}


@pytest.mark.fault(6)
def test_bad_numbers_are_named():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        CalibrationRunner(model, [token_ids()], progress=False).run(outputs)
    model = tiny_model("llama")
    model.model.layers[0].mlp.down_proj.weight.data.mul_(3e38)
    with pytest.raises(ValueError, match=r"sample 0.*layers\.0.*NaN or Inf"):
        CalibrationRunner(model, [token_ids()], progress=False).run(outputs)


def test_the_plan_says_what_a_run_takes(tmp_path):
    model, samples = tiny_model("llama"), [token_ids(4, 64)]
    side = 256 * 64 * 4

    def plan(workspace=0, **how):
        runner = CalibrationRunner(model, samples, progress=False, **how)
        return runner.plan(lambda block, tokens: (1e9 * tokens / 256, workspace))

    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert plan().blocks == 2
    assert plan().tokens == 256
    assert plan().disk_bytes == 0
    assert plan(activation_budget=side).disk_bytes == side
    assert plan(activation_budget=0).disk_bytes == 2 * side
    assert plan(state_dir=tmp_path, activation_budget=0).disk_bytes == 2 * side + weights // 10
    assert plan(workspace=3 << 30).peak_memory_bytes - plan().peak_memory_bytes == pytest.approx(3 << 30, rel=0.05)
    assert plan().peak_memory_bytes > 100 << 20  # the process itself, torch in it
    assert plan().seconds > 0
    assert "256 calibration tokens" in str(plan())
    assert not list(tmp_path.iterdir())


def test_equal_arguments_are_kept_once():
    model = tiny_model("gemma3")
    calls = BlockCalls(model, find_decoder_blocks(model))
    with torch.no_grad():
        _, (first, second) = calls.record(token_ids(1, 24))
        _, (again, _) = calls.record(token_ids(1, 24, seed=1))
        _, (longer, _) = calls.record(token_ids(1, 25))
    assert first["position_embeddings"][0] is again["position_embeddings"][0]
    assert not torch.equal(first["position_embeddings"][0], second["position_embeddings"][0])  # local and global
    assert longer["position_embeddings"][0].shape[1] == 25


def test_the_bar_says_what_is_done(capfd):
    CalibrationRunner(tiny_model("llama"), [token_ids()]).run(outputs)
    shown = capfd.readouterr().err
    assert "model.layers.0: forward" in shown
    assert "model.layers.1: search" in shown
    assert "2/2" in shown


def test_models_that_are_no_language_models():
    from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with pytest.raises(ValueError, match="not a causal language model"):
        find_decoder_blocks(BertModel(BertConfig(**small, vocab_size=32)))
    with pytest.raises(ValueError, match="encoder-decoder"):
        find_decoder_blocks(T5ForConditionalGeneration(T5Config(d_model=32, num_layers=1, num_heads=2, vocab_size=32)))


class Letters:
    """A tokenizer with one token a letter."""

    def __call__(self, text, **kwargs):
        return {"input_ids": [ord(letter) % 128 for letter in text]}


@pytest.mark.fault(7)
def test_samples_of_text():
    samples = calibration_samples(["a" * 10, "b" * 15], Letters(), n_samples=3, seq_len=10)
    assert [tuple(s.shape) for s in samples] == [(1, 10), (1, 10)]
    assert [tuple(s.shape) for s in calibration_samples(["abc"], Letters(), seq_len=10)] == [(1, 3)]
    assert len(calibration_samples("builtin", Letters(), n_samples=5, seq_len=64)) == 5
    assert not set(builtin_text("evaluation").split("\n\n")) >= set(builtin_text().split("\n\n"))
    assert len(builtin_text()) > 100_000


def test_samples_of_ids():
    ids = token_ids(2, 5)
    assert torch.equal(calibration_samples([ids])[0], ids)
    assert torch.equal(calibration_samples(ids)[0], ids)
    assert calibration_samples(lambda: [[1, 2, 3]])[0].tolist() == [[1, 2, 3]]


def test_an_endless_source_is_read_as_far_as_needed():
    texts = itertools.repeat("abc")
    assert [tuple(s.shape) for s in calibration_samples(texts, Letters(), n_samples=2, seq_len=6)] == [(1, 6), (1, 6)]
    assert len(calibration_samples(itertools.repeat([1, 2]), n_samples=3)) == 3


def broken():
    return map(FailAtCall(lambda index: f"text {index}", 38, RuntimeError("no more")), itertools.count())


@pytest.mark.parametrize(
    ("data", "tokenizer", "kind", "named"),
    [
        ([], None, ValueError, "empty"),
        ([""], Letters(), ValueError, "no tokens"),
        (["text"], None, ValueError, "tokenizer"),
        ("file.txt", Letters(), ValueError, "wanted 'builtin'"),
        ([3.5], None, TypeError, "sample 0"),
        ([[1, "a"]], None, TypeError, "sample 0"),
        ([[]], None, (TypeError, ValueError), "sample 0"),
        (17, None, TypeError, "wanted texts"),
        ([[5, 500]], None, ValueError, "vocabulary ends at 127"),
        (broken, Letters(), ValueError, "sample 37 failed: no more"),
        (["text", 17], Letters(), TypeError, "sample 1 is int"),
        ([[1, 2], "text"], None, TypeError, "sample 1 is str"),
        ([b"bytes"], Letters(), TypeError, "sample 0"),
        ([[-1, 5]], None, ValueError, "from -1 to 5"),
    ],
)
@pytest.mark.fault(7)
def test_bad_samples(data, tokenizer, kind, named):
    with pytest.raises(kind, match=named):
        calibration_samples(data, tokenizer, vocab_size=128)


@pytest.mark.parametrize(
    ("samples", "kind", "named"),
    [
        ([], ValueError, "empty"),
        ([torch.tensor([[1, 128]])], ValueError, "vocabulary ends at 127"),
        ([torch.tensor([1, 2])], ValueError, r"shape \(2,\)"),
        ([torch.zeros(1, 0, dtype=torch.long)], ValueError, r"shape \(1, 0\)"),
        ([torch.zeros(1, 4)], TypeError, "float32"),
        (["text"], TypeError, "sample 0 is str"),
    ],
)
@pytest.mark.fault(7)
def test_samples_that_are_no_ids_of_the_model(samples, kind, named):
    with pytest.raises(kind, match=named):
        CalibrationRunner(tiny_model("llama"), samples)


@pytest.mark.parametrize("how", [{"n_samples": 0}, {"seq_len": 0}])
@pytest.mark.fault(7)
def test_no_samples_asked_for(how):
    with pytest.raises(ValueError, match="wanted at least 1"):
        calibration_samples([[1, 2]], **how)
