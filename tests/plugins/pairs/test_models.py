"""Two methods in one model or one pipeline: the numbers of one of them, or a refusal with its reason."""

import diffusers
import pytest
import torch
import transformers
from diffusers import PipelineQuantizationConfig
from tests.models import tiny_model, token_ids
from tests.plugins.dcae.test_tiling import model as autoencoder
from tests.plugins.pairs.test_serving import SETTINGS, answer
from transformers import AutoModel, AutoModelForCausalLM

import pronghorn.torchsparse as ts
import pronghorn.transformers  # noqa: F401 - registers
from pronghorn.awq import AwqConfig, fuse, quantize_model
from pronghorn.awq.layers import AwqLinear
from pronghorn.dcae import accelerate_dcae
from pronghorn.duoattention import DuoAttentionConfig, apply_duo

PACKED = AwqConfig(group_size=32, method="rtn")
LETTERS = 96


def sparse_network():
    return torch.nn.Sequential(torch.nn.Sequential(ts.nn.Conv3d(2, 4, 3), ts.nn.BatchNorm(4), ts.nn.ReLU())).eval()


@pytest.fixture(scope="module")
def packed_model():
    return quantize_model(tiny_model("llama"), PACKED, progress=False)


def test_packed_weights_are_not_packed_again(packed_model):
    ids = token_ids(1, 8)
    wanted = packed_model(ids).logits
    with pytest.raises(ValueError, match="has packed linears already; quantize the checkpoint that it was made from"):
        quantize_model(packed_model, AwqConfig(bits=3, group_size=32, version="natural"), progress=False)
    with fuse(packed_model):
        with pytest.raises(ValueError, match="has packed linears already"):
            quantize_model(packed_model, PACKED, progress=False)
        with pytest.raises(ValueError, match="fused already"):
            fuse(packed_model)
    assert torch.equal(packed_model(ids).logits, wanted)


def test_a_packed_checkpoint_keeps_its_settings(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", quantization_config=PACKED)
    model.save_pretrained(tmp_path / "packed")
    with pytest.warns(UserWarning, match="quantization_config"):
        again = AutoModelForCausalLM.from_pretrained(
            tmp_path / "packed", quantization_config=AwqConfig(bits=3, group_size=32, version="natural")
        )
    assert again.config.quantization_config.bits == 4
    assert torch.equal(again(token_ids(1, 8)).logits, model(token_ids(1, 8)).logits)


def test_sparse_networks_are_no_language_models():
    network = sparse_network()
    with pytest.raises(ValueError, match="Sequential is not a causal language model"):
        quantize_model(network, PACKED, progress=False)
    with pytest.raises(TypeError, match="got Sequential, wanted a language model of transformers"):
        apply_duo(network, DuoAttentionConfig(**SETTINGS))


def test_encoders_that_see_all_words_are_still_refused():
    """What lets the bare decoder of a pipeline through must not let these."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = AutoModel.from_config(transformers.BertConfig(vocab_size=64, **sizes))
    with pytest.raises(ValueError, match="BertModel is not a causal language model"):
        quantize_model(encoder, PACKED, progress=False)


def test_autoencoders_and_sparse_networks_are_told_apart():
    with pytest.raises(TypeError, match="vae: got Sequential, wanted an AutoencoderDC"):
        accelerate_dcae(sparse_network())
    with pytest.raises(ValueError, match="has nothing to fuse: no sparse convolution"):
        ts.fuse(autoencoder("sana"))


def test_fast_forms_are_not_made_twice():
    vae, network = autoencoder("sana"), sparse_network()
    with accelerate_dcae(vae), pytest.raises(ValueError, match="is in its fast form already"):
        accelerate_dcae(vae)
    with ts.fuse(network), pytest.raises(ValueError, match=r"has nothing to fuse: .* that is not fused already"):
        ts.fuse(network)


def test_a_second_pattern_leaves_the_first_as_it_was():
    model = tiny_model("llama", max_position_embeddings=512)
    turned = {**SETTINGS, "gates": [[0.0, 1.0], [1.0, 0.0]]}
    first = apply_duo(model, DuoAttentionConfig(**SETTINGS))
    alone = answer(model, first)
    second = apply_duo(model, DuoAttentionConfig(**turned))
    assert answer(model, first) == alone
    fresh = tiny_model("llama", max_position_embeddings=512)
    assert answer(model, second) == answer(fresh, apply_duo(fresh, DuoAttentionConfig(**turned)))
    assert answer(model, second) != alone


def test_reordered_heads_take_no_other_pattern():
    model = tiny_model("llama", max_position_embeddings=512)
    wanted = answer(model, apply_duo(model, DuoAttentionConfig(**SETTINGS)))
    duo = apply_duo(model, DuoAttentionConfig(**SETTINGS), reorder=True)
    for reorder in (False, True):
        with pytest.raises(ValueError, match="its heads were reordered by an apply_duo before"):
            apply_duo(model, DuoAttentionConfig(**SETTINGS), reorder=reorder)
    assert answer(model, duo) == wanted


def tokenizer():
    """One token a letter."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {letter: index for index, letter in enumerate(["<pad>", *map(chr, range(32, 32 + LETTERS - 1))])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="~")


def save_sana(folder):
    """A pipeline with random weights, its text encoder a Gemma 2 without its output layer."""
    torch.manual_seed(0)
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=8, out_channels=8, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=64,
        sample_size=16,
    )  # fmt: skip
    pipe = diffusers.SanaPipeline(
        tokenizer=tokenizer(), text_encoder=tiny_model("gemma2", intermediate_size=128).model,
        vae=autoencoder("sana"), transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    pipe.save_pretrained(folder)


@pytest.fixture(scope="module")
def sana(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sana")
    save_sana(folder)
    return folder


def picture(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a pronghorn", num_inference_steps=2, height=64, width=96, output_type="pt", generator=torch.manual_seed(0),
        use_resolution_binning=False, complex_human_instruction=None, max_sequence_length=24,
    ).images  # fmt: skip


def test_a_pipeline_with_a_packed_text_encoder(sana, tmp_path):
    whole = picture(diffusers.SanaPipeline.from_pretrained(sana))
    packing = PipelineQuantizationConfig(quant_mapping={"text_encoder": PACKED})
    pipe = diffusers.SanaPipeline.from_pretrained(sana, quantization_config=packing)
    assert isinstance(pipe.text_encoder.layers[0].mlp.up_proj, AwqLinear)
    wanted = picture(pipe)
    assert (wanted - whole).abs().max() > 1e-3  # the words are read by rounded weights
    pipe.save_pretrained(tmp_path)
    assert torch.equal(picture(diffusers.SanaPipeline.from_pretrained(tmp_path)), wanted)
    with accelerate_dcae(pipe.vae), fuse(pipe.text_encoder):
        torch.testing.assert_close(picture(pipe), wanted, rtol=1e-4, atol=2e-5)
    pipe.text_encoder.dequantize()
    torch.testing.assert_close(picture(pipe), wanted, rtol=1e-4, atol=2e-5)


def test_duoattention_leaves_a_text_encoder_as_it_is(sana):
    pipe = diffusers.SanaPipeline.from_pretrained(sana)
    wanted = picture(pipe)
    # One layer has a sliding window, so its heads are full.
    apply_duo(pipe.text_encoder, DuoAttentionConfig(**{**SETTINGS, "gates": [[1.0, 1.0], [1.0, 0.0]]}))
    with accelerate_dcae(pipe.vae):
        torch.testing.assert_close(picture(pipe), wanted, rtol=1e-4, atol=2e-5)


def test_an_autoencoder_is_not_packed(tmp_path):
    autoencoder("sana").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Unknown quantization type, got pronghorn_awq"):
        diffusers.AutoencoderDC.from_pretrained(tmp_path, quantization_config=PACKED)
