"""A SigLIP tower with fewer and larger matrix products, under the names and over the parameters that it has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def join_products(tower: Any) -> None:
    """Let a tower take its patches, and each layer's queries, keys and values, by one product, in place.

    Parameters keep their names. Queries, keys and values lie side by side in memory from then on, until they are moved;
    then they take a product each again, as they do where gradients are recorded. Attention is torch's, without dropout,
    whatever the tower is configured for. Layers whose projections are no plain linear ones are left.

    Args:
        tower: SigLIP of transformers.
    """
    vision = getattr(tower, "vision_model", tower)
    patches = vision.embeddings.patch_embedding
    if _takes_patches(patches):
        vision.embeddings.patch_embedding = PatchProjection(patches)
    for layer in vision.encoder.layers:
        attention = layer.self_attn
        if all(type(getattr(attention, name, None)) is nn.Linear for name in JoinedAttention.PROJECTIONS):
            layer.self_attn = JoinedAttention(attention)


class PatchProjection(nn.Module):
    """A convolution whose windows do not overlap, as the matrix product that it is.

    Its result lies in memory with a patch's channels side by side. A convolution leaves them apart, and so they would
    stay through all residuals, of which every operation then takes several times as long.

    Args:
        convolution: whose parameters it has.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, images: Tensor) -> Tensor:
        """[batch, channels, height, width] to [batch, width of a patch, rows, columns]."""
        down, across = self.weight.shape[2:]
        rows, columns = images.shape[2] // down, images.shape[3] // across
        windows = images[:, :, : rows * down, : columns * across].unflatten(3, (columns, across))
        windows = windows.unflatten(2, (rows, down)).permute(0, 2, 4, 1, 3, 5)
        return F.linear(windows.flatten(3), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class JoinedAttention(nn.Module):
    """Attention among the patches of an image.

    Args:
        attention: of SigLIP, whose projections it has.
    """

    PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.q_proj: nn.Linear = attention.q_proj
        self.k_proj: nn.Linear = attention.k_proj
        self.v_proj: nn.Linear = attention.v_proj
        self.out_proj: nn.Linear = attention.out_proj
        _lay_side_by_side([linear.weight for linear in self._joined()])
        _lay_side_by_side([linear.bias for linear in self._joined()])
        self.register_state_dict_post_hook(_apart)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        """[batch, tokens, width], and a mask to add, to [batch, tokens, width]; weights of attention are not given."""
        linears = self._joined()
        weight = _side_by_side([linear.weight for linear in linears])
        bias = _side_by_side([linear.bias for linear in linears])
        if weight is None or bias is None or torch.is_grad_enabled():  # their gradients are their own
            parts = [linear(hidden_states) for linear in linears]
        else:
            parts = list(F.linear(hidden_states, weight, bias).chunk(3, dim=-1))
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=self.scale)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None

    def _joined(self) -> list[nn.Linear]:
        return [self.q_proj, self.k_proj, self.v_proj]


def _takes_patches(module: Any) -> bool:
    """Whether it is a convolution whose windows tile an image."""
    if type(module) is not nn.Conv2d or module.groups > 1 or module.stride != module.kernel_size:
        return False
    return set(module.dilation) == {1} and (module.padding == "valid" or set(module.padding) == {0})


def _apart(module: JoinedAttention, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Safetensors saves no parts of a larger tensor."""
    for name in module.PROJECTIONS[:3]:
        for part in ("weight", "bias"):
            key = f"{prefix}{name}.{part}"
            state[key] = state[key].clone()


def _lay_side_by_side(parameters: Sequence[Tensor]) -> None:
    """Make them parts of one tensor, joined in their first dimension."""
    joined = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, part in zip(parameters, joined.split([len(parameter) for parameter in parameters]), strict=True):
        parameter.data = part


def _side_by_side(parameters: Sequence[Tensor]) -> Tensor | None:
    """The tensor that they are parts of; None where they are not, any more."""
    first = parameters[0]
    end = first.data_ptr()
    for parameter in parameters:
        if parameter.data_ptr() != end or not parameter.is_contiguous():
            return None
        end += parameter.nbytes
    shape = (sum(map(len, parameters)), *first.shape[1:])
    storage = first.untyped_storage()
    if end > storage.data_ptr() + storage.nbytes():  # neighbours by chance, of memory that is not one
        return None
    return first.detach().as_strided(shape, first.stride())
