"""pi0.5 at its true size with random weights, or in small for tests, and what it sees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from harness import device
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi05.modeling_pi05 import PI05Policy
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor, nn

from pronghorn.vlash.lerobot.configuration_vlash import PI05, VLASHConfig
from pronghorn.vlash.lerobot.pi import PiComputation
from pronghorn.vlash.pi.adapt import pi_model
from pronghorn.vlash.pi.fusion import unfuse
from pronghorn.vlash.pi.modulation import adaptive_norms

ROBOT = 7  # coordinates of its state and of its actions


@dataclass(frozen=True)
class Size:
    """What is computed: the models' widths are LeRobot's.

    Attributes:
        image: pixels on a side.
        text: tokens that a prompt is padded to.
        words: tokens of a usual prompt: a task in some words, and seven coordinates with up to three digits each.
        vocabulary: words that there are.
        horizon: actions of a chunk.
        steps: of Euler's method.
        batch: samples of a training step.
        repeats: timed calls.
        seconds: of a run of control.
    """

    image: int = 224
    text: int = 200
    words: int = 60
    vocabulary: int = 257152
    horizon: int = 50
    steps: int = 10
    batch: int = 4
    repeats: int = 30
    seconds: float = 10.0


def build(size: Size) -> PI05Policy:
    """LeRobot's policy, its modulations random too, where LeRobot begins at zero."""
    config = PI05Config(
        device=str(device()), dtype="bfloat16", chunk_size=size.horizon, n_action_steps=size.horizon,
        image_resolution=(size.image, size.image), tokenizer_max_length=size.text, num_inference_steps=size.steps,
    )  # fmt: skip
    config.output_features = {ACTION: PolicyFeature(FeatureType.ACTION, (ROBOT,))}
    config.input_features = features(size, 1)
    torch.manual_seed(0)
    with torch.device(device()):
        policy = PI05Policy(config)
    experts = policy.model.paligemma_with_expert
    experts.paligemma.lm_head = experts.gemma_expert.lm_head = None
    for norm in adaptive_norms(experts.gemma_expert.model):
        nn.init.normal_(norm.dense.weight, std=0.02)
    return policy.eval()


def features(size: Size, cameras: int) -> dict[str, PolicyFeature]:
    """What the policy sees."""
    image = PolicyFeature(FeatureType.VISUAL, (3, size.image, size.image))
    state = PolicyFeature(FeatureType.STATE, (ROBOT,))
    return {**{f"observation.images.camera{number}": image for number in range(cameras)}, OBS_STATE: state}


def observation(size: Size, cameras: int, batch: int = 1, words: int | None = None) -> dict[str, Tensor]:
    """As the policy's processors give it, on the CPU; without padding unless a number of words is given."""
    generator = torch.Generator().manual_seed(cameras)
    return {
        name: torch.rand(batch, *feature.shape, generator=generator)
        for name, feature in features(size, cameras).items()
    } | {
        OBS_LANGUAGE_TOKENS: torch.randint(size.vocabulary, (batch, size.text), generator=generator),
        OBS_LANGUAGE_ATTENTION_MASK: (torch.arange(size.text) < (words or size.text)).expand(batch, -1),
    }  # fmt: skip


def there(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the policy's device."""
    return {name: value.to(device()) for name, value in batch.items()}


def computation(policy: PI05Policy, **options: Any) -> PiComputation:
    """Ours, over LeRobot's policy."""
    config = VLASHConfig(base=PI05, device=str(device()), chunk_size=policy.config.chunk_size, **options)
    return PiComputation(policy, config)


@contextmanager
def fast(policy: PI05Policy) -> Iterator[PiComputation]:
    """Ours in inference; afterwards LeRobot's policy is as it was."""
    seeing = policy.model.paligemma_with_expert.paligemma.model
    kept = deepcopy([seeing.vision_tower, seeing.multi_modal_projector])
    ours = computation(policy, fuse_projections=True, cuda_graphs=True, vision_dtype="bfloat16")
    ours.prepare()
    yield ours
    pi = pi_model(policy.model)
    unfuse([*pi.prefix_expert.layers, *pi.expert.layers])
    seeing.vision_tower, seeing.multi_modal_projector = kept


def stock(policy: PI05Policy, seen: dict[str, Tensor]) -> Tensor:
    """LeRobot's chunk, without its looking after the modules' mode, which takes a millisecond."""
    images, masks = policy._preprocess_images(seen)
    chunk: Tensor = policy.model.sample_actions(
        images, masks, seen[OBS_LANGUAGE_TOKENS], seen[OBS_LANGUAGE_ATTENTION_MASK]
    )
    return chunk[..., :ROBOT]
