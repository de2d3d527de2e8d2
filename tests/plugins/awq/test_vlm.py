"""Multimodal models: only the language tower is quantized, calibrated with text."""

import pytest
import torch
from tests.models import SIZES, token_ids
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from pronghorn.awq import AwqConfig, AwqLinear, AwqSearch, quantize_model


@pytest.fixture
def llava():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_index=100)
    return LlavaForConditionalGeneration(config).eval()


def test_the_language_tower_of_a_vlm(llava):
    ids = token_ids()
    ids[ids == 100] = 99
    config = AwqConfig(group_size=32, grid=4)
    with torch.no_grad():
        before = llava(input_ids=ids).logits
        result = AwqSearch(config, progress=False).run(llava, [ids])
        assert {prev.split(".layers.")[0] for prev, _, _ in result.scale} == {"model.language_model"}
        result.clip.clear()
        result.apply(llava)
        after = llava(input_ids=ids).logits
    assert (after - before).norm() < 1e-5 * before.norm()
    quantize_model(llava, config, progress=False)
    packed = [name for name, module in llava.named_modules() if isinstance(module, AwqLinear)]
    assert len(packed) == 14
    assert all(name.startswith("model.language_model.layers.") for name in packed)
