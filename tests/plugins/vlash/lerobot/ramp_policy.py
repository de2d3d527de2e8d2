"""A policy that goes on by 1 a step from the state that it is shown: what a robot does tells what was shown."""

from dataclasses import dataclass

import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.policies import PreTrainedPolicy
from lerobot.processor import make_default_pre_post_processors

CAMERA, STATE, ACTION = "observation.images.front", "observation.state", "action"


@PreTrainedConfig.register_subclass("ramp")
@dataclass
class RampConfig(PreTrainedConfig):
    chunk_size: int = 8
    n_action_steps: int = 8
    device: str = "cpu"

    observation_delta_indices = reward_delta_indices = None

    @property
    def action_delta_indices(self):
        return list(range(self.chunk_size))

    @property
    def normalization_mapping(self):
        return {"STATE": NormalizationMode.IDENTITY, "ACTION": NormalizationMode.IDENTITY}

    def validate_features(self):
        pass

    def get_optimizer_preset(self):
        pass

    def get_scheduler_preset(self):
        pass


class RampPolicy(PreTrainedPolicy):
    """`before` is called with each batch, and may raise, wait, or give a chunk in place of the ramp."""

    config_class = RampConfig
    name = "ramp"

    def __init__(self, config, **ignored):
        super().__init__(config)
        self.before, self.batches, self.resets = None, [], 0

    def reset(self):
        self.resets += 1

    def predict_action_chunk(self, batch):
        self.batches.append(batch)
        instead = self.before(batch) if self.before is not None else None
        return self.ramp(batch[STATE]) if instead is None else instead

    def ramp(self, state):
        return state[:, None] + torch.arange(1.0, self.config.chunk_size + 1)[:, None]

    def get_optim_params(self):
        return {}

    def forward(self, batch):
        raise NotImplementedError

    def select_action(self, batch):
        raise NotImplementedError


def ramp(chunk_size=8, n_action_steps=None, camera=False, dims=2):
    """The policy and its processors."""
    features = {STATE: PolicyFeature(FeatureType.STATE, (dims,))}
    if camera:
        features[CAMERA] = PolicyFeature(FeatureType.VISUAL, (3, 32, 32))
    config = RampConfig(
        chunk_size=chunk_size, n_action_steps=n_action_steps or chunk_size, input_features=features,
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (dims,))},
    )  # fmt: skip
    return RampPolicy(config), *make_default_pre_post_processors(config)
