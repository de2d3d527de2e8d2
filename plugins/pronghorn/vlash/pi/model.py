"""pi0 and pi0.5: errors of one delay or of all in training, and chunks of actions in inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pronghorn.vlash import flow
from pronghorn.vlash.pi.gemma import Condition
from pronghorn.vlash.pi.joint import Cache, Layout, joint_forward, prefix_cache, suffix_forward
from pronghorn.vlash.pi.modulation import StackedModulation, adaptive_norms, modulations
from pronghorn.vlash.pi.rotation import Rotation, rotation
from pronghorn.vlash.pi.suffix import PI0, PI05, has_state_condition, kind_of, suffix_condition, suffix_tokens


@dataclass(frozen=True)
class Prefix:
    """What is seen: embedded images and text.

    Attributes:
        embeddings: [batch, Lp, prefix_width].
        mask: bool [batch, Lp], False for padding and for cameras that are missing.
    """

    embeddings: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        if self.embeddings.dim() != 3 or self.mask.shape != self.embeddings.shape[:2]:
            raise ValueError(
                f"mask: got shape {tuple(self.mask.shape)}, wanted that of the tokens, "
                f"{tuple(self.embeddings.shape[:2])}"
            )

    @classmethod
    def join(cls, images: Sequence[Tensor], image_masks: Sequence[Tensor], text: Tensor, text_mask: Tensor) -> Prefix:
        """Images first, then text.

        Args:
            images: [batch, tokens, prefix_width], one for each camera.
            image_masks: bool [batch], whether the camera's image is there.
            text: [batch, tokens, prefix_width].
            text_mask: bool [batch, tokens].

        Raises:
            ValueError: there is not one mask for each image.
        """
        if len(images) != len(image_masks):
            raise ValueError(f"image_masks: got {len(image_masks)}, wanted one for each of {len(images)} images")
        masks = [mask[:, None].expand(image.shape[:2]) for image, mask in zip(images, image_masks, strict=True)]
        return cls(torch.cat([*images, text], dim=1), torch.cat([*masks, text_mask], dim=1))


@dataclass(frozen=True)
class PiModel:
    """A pi0 or pi0.5 over modules that someone else holds; `adapt.pi_model` makes one.

    Attributes:
        prefix_expert: has `layers`, which see images and text.
        expert: has `layers` and `norm`, for actions.
        suffix: has the projections of actions, times and states.
        readout: has `action_out_proj`.
        frequencies: [head_dim / 2], of the rotary positions.
        dtype: in which the layers compute.
        periods: the shortest and the longest of the sines of the time.
        state_dtype: to which pi0's state token is rounded; the authors' code has bfloat16.
        gradient_checkpointing: compute each layer again in the backward pass.
    """

    prefix_expert: Any
    expert: Any
    suffix: Any
    readout: Any
    frequencies: Tensor
    dtype: torch.dtype
    periods: tuple[float, float] = (4e-3, 4.0)
    state_dtype: torch.dtype | None = None
    gradient_checkpointing: bool = False

    @property
    def kind(self) -> str:
        """Whether it is a "pi0" or a "pi05"."""
        return kind_of(self.suffix)

    @property
    def _state_tokens(self) -> int:
        return 1 if self.kind == PI0 else 0

    def losses(
        self, prefix: Prefix, state: Tensor | None, actions: Tensor, noise: Tensor, time: Tensor,
        delay: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The squared error of the velocity, for one delay of each sample.

        Args:
            prefix: what is seen.
            state: [batch, state_dim]; None for a pi0.5 that reads it in its prompt.
            actions: [batch, H, action_dim].
            noise: likewise.
            time: [batch].
            delay: int64 [batch], for a model with delay conditioning.

        Returns:
            [batch, H, action_dim], for `flow.reduce_loss`.

        Raises:
            ValueError: shapes do not fit each other or the model, or it needs what is None.
        """
        return self.shared_losses(
            prefix, _one_branch(state), actions[:, None], noise[:, None], time[:, None], delay=_one_branch(delay)
        )[:, 0]

    def shared_losses(
        self, prefix: Prefix, states: Tensor | None, actions: Tensor, noise: Tensor, time: Tensor,
        offset_mask: Tensor | None = None, delay: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The squared error of the velocity, for N delays of each sample over one prefix.

        Args:
            prefix: what is seen.
            states: [batch, N, state_dim].
            actions: [batch, N, H, action_dim].
            noise: likewise.
            time: [batch, N].
            offset_mask: bool [batch, N], False for delays that are padding.
            delay: int64 [batch, N], for a model with delay conditioning.

        Returns:
            [batch, N, H, action_dim], zero where `offset_mask` is False, for `flow.reduce_loss`.

        Raises:
            ValueError: shapes do not fit each other or the model, or it needs what is None; or N > 1 for a pi0.5
                that reads the state in its prompt, of which there is one.
        """
        noisy = flow.interpolate(actions, noise, time)
        velocity = self.velocity(prefix, states, noisy, time, offset_mask, delay)
        errors = (flow.target(actions, noise) - velocity).square()
        return errors if offset_mask is None else errors * offset_mask[..., None, None]

    def velocity(
        self, prefix: Prefix, states: Tensor | None, noisy: Tensor, time: Tensor, offset_mask: Tensor | None = None,
        delay: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The velocity at N places of each sample, over one prefix; arguments as in `shared_losses`."""
        self._check(prefix, states, noisy, time, offset_mask, delay)
        shape = noisy.shape[:2]
        state, after, when = _rows(states), _rows(delay), time.flatten()
        tokens = suffix_tokens(self.suffix, state, noisy.flatten(0, 1), when, after, self.periods, self.state_dtype)
        condition = suffix_condition(self.suffix, state, when, after, self.periods)
        if offset_mask is None:
            offset_mask = torch.ones(shape, dtype=torch.bool, device=noisy.device)
        cos, sin = self._suffix_rotation(prefix.mask, tokens.shape[1])
        layout = Layout(
            prefix.mask, offset_mask, self._prefix_rotation(prefix.mask),
            (cos.repeat_interleave(shape[1], 0), sin.repeat_interleave(shape[1], 0)), self._state_tokens,
        )  # fmt: skip
        hidden = joint_forward(
            self.prefix_expert, self.expert, prefix.embeddings.to(self.dtype), tokens.to(self.dtype), condition, layout,
            gradient_checkpointing=self.gradient_checkpointing,
        )  # fmt: skip
        return self._read(hidden).unflatten(0, shape)

    @torch.no_grad()
    def sample(
        self, prefix: Prefix, state: Tensor | None, noise: Tensor, steps: int = 10, *, delay: Tensor | None = None,
        stacked: StackedModulation | None = None, guide: flow.Guide | None = None,
    ) -> Tensor:  # fmt: skip
        """A chunk of actions: the prefix once, then the suffix at each Euler step.

        Nothing waits for the device, so that it can be captured as a CUDA graph.

        Args:
            prefix: what is seen.
            state: [batch, state_dim]; None for a pi0.5 that reads it in its prompt.
            noise: [batch, H, action_dim], where the integration starts.
            steps: of Euler's method.
            delay: int64 [batch], for a model with delay conditioning.
            stacked: all adaptive norms' projections as one.
            guide: changes the velocity on the way, as real-time chunking does.

        Returns:
            [batch, H, action_dim].

        Raises:
            ValueError: as for `losses`.
        """
        times = flow.euler_times(steps)
        self._check(prefix, _one_branch(state), noise[:, None], None, None, _one_branch(delay))
        cache = prefix_cache(
            self.prefix_expert, prefix.embeddings.to(self.dtype), prefix.mask, self._prefix_rotation(prefix.mask)
        )
        conditions = dict(zip(times, self._conditions(state, noise, times, delay, stacked), strict=True))
        by = self._suffix_rotation(prefix.mask, noise.shape[1] + self._state_tokens)

        def velocity(x: Tensor, time: float) -> Tensor:
            return self._denoise(x, state, self._at([time], noise)[0], delay, cache, prefix.mask, conditions[time], by)

        return flow.integrate(velocity, noise, steps, guide)

    def _denoise(
        self, x: Tensor, state: Tensor | None, time: Tensor, delay: Tensor | None, cache: Cache, mask: Tensor,
        conditions: Sequence[Condition], by: Rotation,
    ) -> Tensor:  # fmt: skip
        tokens = suffix_tokens(self.suffix, state, x, time, delay, self.periods, self.state_dtype).to(self.dtype)
        hidden = suffix_forward(self.expert, tokens, cache, mask, conditions, by, self._state_tokens)
        return self._read(hidden).to(x.dtype)

    def _conditions(
        self, state: Tensor | None, noise: Tensor, times: list[float], delay: Tensor | None,
        stacked: StackedModulation | None,
    ) -> Sequence[Sequence[Condition]]:  # fmt: skip
        """For each step, what each norm gets."""
        norms = adaptive_norms(self.expert)
        spread = [None if part is None else part.expand(len(times), *part.shape) for part in (state, delay)]
        made = suffix_condition(self.suffix, spread[0], self._at(times, noise), spread[1], self.periods)
        if made is None:
            return [[None] * len(norms)] * len(times)
        return modulations(norms, made) if stacked is None else stacked(made, self.dtype)

    def _at(self, times: list[float], noise: Tensor) -> Tensor:
        """[steps, batch]."""
        dtype = torch.promote_types(noise.dtype, torch.float32)
        return torch.stack([torch.full((len(noise),), time, dtype=dtype, device=noise.device) for time in times])

    def _prefix_rotation(self, mask: Tensor) -> Rotation:
        return rotation(mask.cumsum(1) - 1, self.frequencies, self.dtype)

    def _suffix_rotation(self, mask: Tensor, length: int) -> Rotation:
        positions = mask.sum(1, keepdim=True) + torch.arange(length, device=mask.device)
        return rotation(positions, self.frequencies, self.dtype)

    def _read(self, hidden: Tensor) -> Tensor:
        project = self.readout.action_out_proj
        result: Tensor = project(hidden[:, self._state_tokens :].to(project.weight.dtype))
        return result

    def _check(
        self, prefix: Prefix, states: Tensor | None, noisy: Tensor, time: Tensor | None, mask: Tensor | None,
        delay: Tensor | None,
    ) -> None:  # fmt: skip
        width = self.suffix.action_in_proj.in_features
        if noisy.dim() != 4 or len(noisy) != len(prefix.mask) or noisy.shape[-1] != width:
            raise ValueError(
                f"actions: got shape {tuple(noisy.shape)} with branches, wanted [{len(prefix.mask)}, N, H, {width}]"
            )
        shape = noisy.shape[:2]
        for name, part in (("time", time), ("offset_mask", mask), ("delay", delay)):
            if part is not None and part.shape != shape:
                raise ValueError(f"{name}: got shape {tuple(part.shape)}, wanted {tuple(shape)}")
        if self.kind == PI05 and not has_state_condition(self.suffix):
            if shape[1] > 1:
                raise ValueError(
                    f"actions: got {shape[1]} delays for a pi05 that reads the state in its prompt, wanted 1; "
                    "train with state_cond"
                )
        elif states is None or states.shape != (*shape, self.suffix.state_proj.in_features):
            wanted = (*shape, self.suffix.state_proj.in_features)
            raise ValueError(f"state: got {None if states is None else tuple(states.shape)}, wanted {wanted}")


def _one_branch(x: Tensor | None) -> Tensor | None:
    return None if x is None else x[:, None]


def _rows(x: Tensor | None) -> Tensor | None:
    """[batch, N, ...] to [batch x N, ...]."""
    return None if x is None else x.flatten(0, 1)
