"""pi0 and pi0.5: LeRobot's modules, computed by `pronghorn.vlash.pi`, over shared observations and told the delay."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from lerobot.policies.common.vla_utils import pad_vector
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor

from pronghorn.kernels._recording import Recorded
from pronghorn.vlash import flow
from pronghorn.vlash.lerobot.configuration_vlash import VLASHConfig
from pronghorn.vlash.pi.adapt import embed_prefix, pi_model, without_padding
from pronghorn.vlash.pi.fusion import fuse
from pronghorn.vlash.pi.model import PiModel, Prefix
from pronghorn.vlash.pi.modulation import StackedModulation, adaptive_norms
from pronghorn.vlash.pi.suffix import PI0, add_delay_condition, add_state_condition, has_state_condition, kind_of
from pronghorn.vlash.pi.vision import join_products

TEXT_STEP = 32  # texts are as long as a multiple of it: each length has a recording of its own


class PiComputation:
    """Training and sampling of a wrapped pi0 or pi0.5.

    Args:
        policy: LeRobot's PI0Policy or PI05Policy. With `state_cond` or `delay_conditioning` it gets layers that begin
            at zero.
        config: of the wrapper.

    Attributes:
        added: names, in `policy`, of the weights of those layers.

    Raises:
        ValueError: the policy sees a projected state, without `state_cond`.
    """

    def __init__(self, policy: Any, config: VLASHConfig) -> None:
        self._policy, self._config = policy, config
        before = set(policy.state_dict())
        if has_state_condition(policy.model) and not config.state_cond:
            raise ValueError("state_cond: got False, but the checkpoint has layers for a projected state; wanted True")
        if config.state_cond and not has_state_condition(policy.model):
            add_state_condition(policy.model, policy.config.max_state_dim)
        if config.delay_conditioning:
            add_delay_condition(policy.model, config.max_delay_steps)
        self.added = set(policy.state_dict()) - before
        self._recorded = Recorded(self._chunk)
        self._places: list[int] = []
        self._moves = 0
        self._forget()
        policy.register_load_state_dict_post_hook(self._forget)

    @property
    def samples(self) -> bool:
        """Whether chunks are to come from here, because LeRobot's own sampling does not know of something."""
        config = self._config
        return config.state_cond or config.delay_conditioning or config.fuse_projections or config.cuda_graphs

    def prepare(self) -> None:
        """For inference, as the configuration asks: join projections of all layers, round the vision tower."""
        experts = self._policy.model.paligemma_with_expert
        seeing = experts.paligemma.model
        if self._config.fuse_projections:
            fuse(seeing.language_model.layers)
            fuse(experts.gemma_expert.model.layers)
        if self._config.vision_dtype is not None:
            for part in (seeing.vision_tower, seeing.multi_modal_projector):
                part.to(getattr(torch, self._config.vision_dtype))
        if self._config.fuse_projections:
            join_products(seeing.vision_tower)  # after they were moved
        self._forget()

    def _forget(self, *_: Any) -> None:
        """Parameters may be others than before."""
        self._weights: list[Tensor] | None = None
        self._stacked: StackedModulation | None = None

    def loss(self, prepared: dict[str, Any], delay: Tensor, reduction: str) -> Tensor:
        """The loss of a batch, one delay for each sample or N of them.

        Args:
            prepared: after the policy's processors; actions [batch x N, H, action_dim], states [batch x N, state_dim],
                `action_is_pad` [batch x N, H]; images and text of [batch].
            delay: int64 [batch, N], control steps.
            reduction: "mean", or "none" for one of each sample.
        """
        model, config = self._policy.model, self._policy.config
        shape = delay.shape
        actions = pad_vector(prepared[ACTION], config.max_action_dim).unflatten(0, shape)
        noise = model.sample_noise(actions.shape, actions.device)
        time = model.sample_time(delay.numel(), actions.device).view(shape)
        elements = self._model().shared_losses(
            self._prefix(prepared), self._states(prepared, shape), actions, noise, time, delay=self._told(delay)
        )
        real = None if self._config.loss_padding else self._policy.config.output_features[ACTION].shape[0]
        return flow.reduce_loss(
            elements, prepared["action_is_pad"].unflatten(0, shape), action_dim=real,
            exclude_padding=not self._config.loss_padding, reduction=reduction,
        )  # fmt: skip

    @torch.no_grad()
    def sample(self, prepared: dict[str, Any], delay: int, guide: flow.Guide | None = None) -> Tensor:
        """A chunk of actions, in the policy's units.

        Args:
            prepared: after the policy's processors.
            delay: control steps until the chunk is used.
            guide: changes the velocity on the way.

        Returns:
            [batch, chunk_size, action_dim].
        """
        model, config = self._policy.model, self._policy.config
        tokens, token_mask = without_padding(
            prepared[OBS_LANGUAGE_TOKENS], prepared[OBS_LANGUAGE_ATTENTION_MASK], TEXT_STEP
        )
        rows, device = len(tokens), tokens.device
        noise = model.sample_noise((rows, config.chunk_size, config.max_action_dim), device)
        states = self._states(prepared, torch.Size((rows, 1)))
        told = torch.full((rows,), delay, device=device) if self._config.delay_conditioning else None
        self._stack()
        images = [prepared[name].to(device) if name in prepared else None for name in config.image_features]
        given = (tokens, token_mask, noise, None if states is None else states[:, 0], told, *images)
        if self._config.cuda_graphs and guide is None:
            chunk = self._recorded(*given, state=self._state())
        else:
            chunk = self._chunk(*given, guide=guide)
        return chunk[..., : config.output_features[ACTION].shape[0]]

    def _chunk(
        self, tokens: Tensor, token_mask: Tensor, noise: Tensor, state: Tensor | None, delay: Tensor | None,
        *images: Tensor | None, guide: flow.Guide | None = None,
    ) -> Tensor:  # fmt: skip
        """[batch, chunk_size, max_action_dim], from what the policy's processors give, with an image of each camera."""
        cameras = self._policy.config.image_features
        seen = {name: image for name, image in zip(cameras, images, strict=True) if image is not None}
        prefix = self._prefix({**seen, OBS_LANGUAGE_TOKENS: tokens, OBS_LANGUAGE_ATTENTION_MASK: token_mask})
        steps = self._policy.config.num_inference_steps
        return self._model().sample(prefix, state, noise, steps, delay=delay, stacked=self._stacked, guide=guide)

    def _stack(self) -> None:
        """Join what the norms make of the time, anew where their weights have changed."""
        if not self._config.fuse_projections or kind_of(self._policy.model) == PI0:
            return
        if self._stacked is None or self._stacked.outdated():
            expert = self._policy.model.paligemma_with_expert.gemma_expert.model
            self._stacked = StackedModulation(adaptive_norms(expert))

    def _state(self) -> Hashable:
        """Where the weights are: what a recording depends on besides what is seen."""
        if self._weights is None:
            self._weights = list(self._policy.parameters())
        places = list(map(Tensor.data_ptr, self._weights))
        if places != self._places:  # a number in their place is compared and hashed in no time
            self._places, self._moves = places, self._moves + 1
        stacked = None if self._stacked is None else self._stacked.weight.data_ptr()
        return stacked, self._policy.config.num_inference_steps, self._moves

    def _model(self) -> PiModel:
        # Quantized layers do not tell in which dtype they compute.
        dtype = None if self._config.lora_quantization is None else getattr(torch, self._policy.config.dtype)
        return pi_model(self._policy.model, dtype=dtype)

    def _prefix(self, prepared: dict[str, Any]) -> Prefix:
        images, masks = self._policy._preprocess_images(prepared)
        tokens, token_mask = prepared[OBS_LANGUAGE_TOKENS], prepared[OBS_LANGUAGE_ATTENTION_MASK]
        return embed_prefix(self._policy.model, images, masks, tokens, token_mask)

    def _states(self, prepared: dict[str, Any], shape: torch.Size) -> Tensor | None:
        model = self._policy.model
        if kind_of(model) != PI0 and not has_state_condition(model):
            return None
        return pad_vector(prepared[OBS_STATE], self._policy.config.max_state_dim).unflatten(0, shape)

    def _told(self, delay: Tensor) -> Tensor | None:
        return delay if self._config.delay_conditioning else None
