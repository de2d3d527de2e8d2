"""UViT: a transformer on latents with skips like a U-Net's, for class-conditional diffusion; also what USiT is."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional

from pronghorn.dcae.diffusers.whole_checkpoints import WholeCheckpoints, check_sizes

# Blocks, channels and heads of the published sizes.
SIZES = {"S": (12, 512, 8), "H": (28, 1152, 16), "2B": (28, 2048, 32)}


class UViT2DModel(WholeCheckpoints, ModelMixin, ConfigMixin):  # type: ignore[misc]  # both bases define config_name
    """Noise, or a velocity, of latents at a time and of a class.

    Parameters have the official code's names.

    Args:
        sample_size: height and width of a latent.
        patch_size: places of a token's edge.
        in_channels: of a latent.
        hidden_size: channels of a token.
        depth: number of blocks; 2 · (depth // 2) + 1 are made.
        num_attention_heads: of each block.
        num_classes: the label `num_classes` is that of no class, which guidance needs.
        upcast_attention: attend in float32 where the model is in half precision, as the official code does; without,
            attention is faster there. Under autocast neither counts: that has its own precision for attention.

    Raises:
        ValueError: sizes do not divide.

    Source: Bao et al., All are Worth Words (arXiv 2209.12152); Chen et al. (arXiv 2410.10733), section 4, for its use
    on deep latents.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["_Block"]  # noqa: RUF012 - diffusers' own attribute, for `compile_repeated_blocks`

    @register_to_config
    def __init__(
        self,
        sample_size: int = 16,
        patch_size: int = 1,
        in_channels: int = 32,
        hidden_size: int = 1152,
        depth: int = 28,
        num_attention_heads: int = 16,
        num_classes: int = 1000,
        upcast_attention: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(depth=depth, num_attention_heads=num_attention_heads, sample_size=sample_size)
        for name, many, few in (("patch_size", sample_size, patch_size),
                                ("num_attention_heads", hidden_size, num_attention_heads)):  # fmt: skip
            if few < 1 or many % few:
                raise ValueError(f"{name}: got {few}, wanted a divisor of {many}")
        self.sample_size, self.patch_size, self.num_classes = sample_size, patch_size, num_classes
        self.in_channels, self.hidden_size = in_channels, hidden_size
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Any = None  # diffusers sets it when checkpointing is turned on
        tokens = 2 + (sample_size // patch_size) ** 2
        self.patch_embed = _Patches(in_channels, hidden_size, patch_size)
        self.label_emb = _Labels(num_classes + 1, hidden_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, hidden_size))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        given, half = (hidden_size, num_attention_heads, upcast_attention), depth // 2
        self.in_blocks = nn.ModuleList(_Block(*given) for _ in range(half))
        self.mid_block = _Block(*given)
        self.out_blocks = nn.ModuleList(_Block(*given, skip=True) for _ in range(half))
        self.norm = nn.LayerNorm(hidden_size)
        self.decoder_pred = nn.Linear(hidden_size, patch_size**2 * in_channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """What the model was trained to predict.

        Args:
            sample: [batch, in_channels, sample_size, sample_size].
            timestep: [batch] or one number, in the unit of the training.
            class_labels: int64 [batch], from 0 to `num_classes`, which is none.
            return_dict: give a `Transformer2DModelOutput` rather than a tuple.

        Raises:
            ValueError: a shape does not fit.
        """
        batch, size = len(sample), self.sample_size
        if sample.shape[1:] != (self.in_channels, size, size):
            raise ValueError(f"sample: got {tuple(sample.shape)}, wanted [batch, {self.in_channels}, {size}, {size}]")
        if class_labels.shape != (batch,):
            raise ValueError(f"class_labels: got {tuple(class_labels.shape)}, wanted ({batch},)")
        times = torch.as_tensor(timestep, device=sample.device).expand(batch)
        time = get_timestep_embedding(times, self.hidden_size, flip_sin_to_cos=True, downscale_freq_shift=0)
        label = self.label_emb(class_labels)
        x = torch.cat([label[:, None], time.to(label.dtype)[:, None], self.patch_embed(sample)], dim=1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            x = self._run(block, x)
            skips.append(x)
        x = self._run(self.mid_block, x)
        for block in self.out_blocks:
            x = self._run(block, x, skips.pop())
        patches = self.decoder_pred(self.norm(x))[:, 2:]
        across, edge = size // self.patch_size, self.patch_size
        found = patches.view(batch, across, across, edge, edge, -1).permute(0, 5, 1, 3, 2, 4).reshape(sample.shape)
        return Transformer2DModelOutput(sample=found) if return_dict else (found,)

    def _run(self, block: nn.Module, *given: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            recomputed: Tensor = self._gradient_checkpointing_func(block, *given)
            return recomputed
        result: Tensor = block(*given)
        return result


class _Patches(nn.Module):
    def __init__(self, channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        return y.flatten(2).transpose(1, 2)


class _Labels(nn.Module):
    def __init__(self, labels: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(labels, hidden_size)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, labels: Tensor) -> Tensor:
        found: Tensor = self.embedding_table(labels)
        return found


class _Attention(nn.Module):
    def __init__(self, size: int, heads: int, upcast: bool) -> None:
        super().__init__()
        self.heads, self.upcast = heads, upcast
        self.qkv = nn.Linear(size, 3 * size, bias=False)
        self.proj = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        half = qkv.dtype in (torch.float16, torch.bfloat16)
        # Autocast would take back what was made float32.
        wide = qkv.float() if self.upcast and half and not torch.is_autocast_enabled(qkv.device.type) else qkv
        # The three are taken apart before they are transposed, so that their gradients are put together without.
        q, k, v = (part.transpose(1, 2) for part in wide.unflatten(2, (3, self.heads, -1)).unbind(2))
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        found: Tensor = self.proj(y.to(qkv.dtype))
        return found


class _Perceptron(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return y


class _Block(nn.Module):
    """Attention and a perceptron, each after a norm; before them a skip is joined."""

    def __init__(self, size: int, heads: int, upcast: bool, *, skip: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attn, self.mlp = _Attention(size, heads, upcast), _Perceptron(size)
        self.skip_linear = nn.Linear(2 * size, size) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=2))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))
