"""Policies, a data set and a tokenizer so small that a test can have them."""

from pathlib import Path

import numpy as np
import torch
from transformers import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig

CAMERA, STATE, ACTION = "observation.image", "observation.state", "action"
IMAGE_SIZE = 96  # gym-pusht's
ACT = {
    "dim_model": 16, "n_heads": 2, "dim_feedforward": 16, "n_encoder_layers": 1, "n_vae_encoder_layers": 1,
    "latent_dim": 4, "pretrained_backbone_weights": None,
}  # fmt: skip
DIFFUSION = {
    "horizon": 16, "down_dims": [16, 32], "n_groups": 4, "diffusion_step_embed_dim": 16, "num_inference_steps": 2,
    "spatial_softmax_num_keypoints": 4, "pretrained_backbone_weights": None, "use_group_norm": True,
}  # fmt: skip
PI = {
    "max_state_dim": 8, "max_action_dim": 8, "image_resolution": [28, 28], "tokenizer_max_length": 16,
    "num_inference_steps": 2,
}  # fmt: skip
WIDTHS = {"gemma_2b": 24, "gemma_300m": 16}


def dataset(root: Path, state_dim: int = 2, action_dim: int = 2, episodes: int = 2, frames: int = 20):
    """Goals that a robot follows, seen by a camera of noise."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    made = LeRobotDataset.create(
        repo_id="tiny/local", fps=10, root=root, use_videos=False,
        features={
            CAMERA: {"dtype": "image", "shape": (IMAGE_SIZE, IMAGE_SIZE, 3), "names": ["height", "width", "channel"]},
            STATE: {"dtype": "float32", "shape": (state_dim,), "names": [f"s{i}" for i in range(state_dim)]},
            ACTION: {"dtype": "float32", "shape": (action_dim,), "names": [f"a{i}" for i in range(action_dim)]},
        },
    )  # fmt: skip
    random = np.random.default_rng(0)
    for _ in range(episodes):
        position = random.uniform(100, 400, state_dim)
        for _ in range(frames):
            goal = np.clip(position + random.normal(0, 30, state_dim), 0, 512)
            made.add_frame(
                {
                    CAMERA: random.integers(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8),
                    STATE: position.astype(np.float32),
                    ACTION: np.resize(goal, action_dim).astype(np.float32),
                    "task": "push the T",
                }
            )
            position = position + 0.5 * (goal - position)
        made.save_episode()
    made.finalize()
    return made


def tokenizer(folder: Path) -> Path:
    """One token a character."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<pad>", "<unk>", *map(chr, range(32, 127)), "\n"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return folder


def smolvla(folder: Path) -> dict:
    """Options of a SmolVLA whose vision-language model is in a folder."""
    from transformers import (
        AutoTokenizer,
        PreTrainedTokenizerFast,
        SmolVLMConfig,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
    )
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    text = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 16,
    }  # fmt: skip
    SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=2, pad_token_id=0).save_pretrained(folder)
    plain = AutoTokenizer.from_pretrained(tokenizer(folder))
    special = {
        "fake_image_token": "<fake_token_around_image>", "image_token": "<image>", "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }  # fmt: skip
    words = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer, pad_token="<pad>", unk_token="<unk>", extra_special_tokens=special
    )
    SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(), tokenizer=words, video_processor=SmolVLMVideoProcessor()
    ).save_pretrained(folder)
    return {
        "vlm_model_name": str(folder), "num_vlm_layers": 2, "resize_imgs_with_padding": [32, 32], "max_state_dim": 8,
        "max_action_dim": 8, "num_steps": 2, "expert_width_multiplier": 0.5,
    }  # fmt: skip


def perturbed(policy):
    """Random weights also where LeRobot begins at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return policy


def shrink_pi(monkeypatch) -> None:
    """Have LeRobot build pi0 and pi0.5 of two narrow layers."""
    from lerobot.policies.pi0 import modeling_pi0
    from lerobot.policies.pi05 import modeling_pi05

    for module in (modeling_pi0, modeling_pi05):
        build_vlm, build_expert = module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM

        def sizes(variant, module=module):
            return module.GemmaConfig(WIDTHS[variant], depth=2, mlp_dim=32, num_heads=8, num_kv_heads=1, head_dim=8)

        def vlm(config, build=build_vlm):
            config.text_config.vocab_size = config._vocab_size = 128
            config.image_token_index = 127
            config.vision_config.intermediate_size = 16
            config.vision_config.projection_dim = config.projection_dim = config.text_config.hidden_size
            return build(config=config)

        def expert(config, build=build_expert):
            config.vocab_size = 8
            return build(config=config)

        def configuration():
            vision = SiglipVisionConfig(
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                patch_size=14,
                vision_use_head=False,
            )
            return PaliGemmaConfig(vision_config=vision)

        monkeypatch.setattr(module, "get_gemma_config", sizes)
        monkeypatch.setattr(module, "PaliGemmaForConditionalGenerationWithPiGemma", vlm)
        monkeypatch.setattr(module, "PiGemmaForCausalLM", expert)
        monkeypatch.setattr(module, "CONFIG_MAPPING", {"paligemma": configuration, "gemma": GemmaConfig})


def observation(batch: int = 2, state_dim: int = 2, size: int = IMAGE_SIZE, seed: int = 0) -> dict:
    """As an environment gives it."""
    generator = torch.Generator().manual_seed(seed)
    return {
        CAMERA: torch.rand(batch, 3, size, size, generator=generator),
        STATE: torch.rand(batch, state_dim, generator=generator) * 500,
        "task": ["push the T"] * batch,
    }
