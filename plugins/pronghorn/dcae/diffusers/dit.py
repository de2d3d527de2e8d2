"""DiT on deep latents: diffusers' transformer, made as the original is for whoever trains one from scratch."""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import Timesteps
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  # diffusers loads parts of pipelines by it
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import nn

from pronghorn.dcae.diffusers.whole_checkpoints import WholeCheckpoints, check_sizes

TIME_CHANNELS = 256
# Blocks, channels and heads of the published sizes.
DIT_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


class DiT2DModel(WholeCheckpoints, DiTTransformer2DModel):  # type: ignore[misc]  # both of its bases define config_name
    """The noise in latents at a time and of a class, and how certain it is; the defaults are DiT-XL's on f32 latents.

    diffusers' `DiTTransformer2DModel`, save that:

    - all blocks share one embedding of times and classes, where that has a copy in each, for another 75 million
      parameters of DiT-XL; in a checkpoint it is the first block's;
    - frequencies of times are the original's, and so is what training starts from: every block passes on its input;
    - it leaves dropping labels to `LearnedVarianceObjective`: in training that one drops them in each block apart.

    Args:
        num_attention_heads: of each block.
        attention_head_dim: channels of a head; a token has as many as all heads.
        in_channels: of a latent.
        out_channels: by default twice as many: noise, then variances.
        num_layers: number of blocks.
        dropout: within blocks.
        norm_num_groups: is without effect, as in diffusers' model.
        attention_bias: whether queries, keys and values have biases.
        sample_size: height and width of a latent.
        patch_size: places of a token's edge.
        activation_fn: of the perceptrons.
        num_embeds_ada_norm: number of classes; the label of this number is that of no class.
        upcast_attention: attend in float32 where the model is in half precision.
        norm_type: "ada_norm_zero".
        norm_elementwise_affine: whether norms have weights of their own.
        norm_eps: of the second norm in each block.

    Raises:
        ValueError: the patches do not divide a latent.

    Source: Peebles and Xie, Scalable Diffusion Models with Transformers (arXiv 2212.09748).
    """

    _repeated_blocks = ["BasicTransformerBlock"]  # noqa: RUF012 - diffusers' own attribute, for `compile_repeated_blocks`

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 32,
        out_channels: int | None = None,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        attention_bias: bool = True,
        sample_size: int = 16,
        patch_size: int = 1,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_zero",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        check_sizes(num_layers=num_layers, num_attention_heads=num_attention_heads, sample_size=sample_size)
        if patch_size < 1 or sample_size % patch_size:
            raise ValueError(f"patch_size: got {patch_size}, wanted a divisor of {sample_size}")
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__(**{**given, "out_channels": 2 * in_channels if out_channels is None else out_channels})
        first, *others = self.transformer_blocks
        shared = first.norm1.emb
        shared.time_proj = Timesteps(TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        shared.class_embedder.dropout_prob = 0.0
        for block in others:
            del block.norm1.emb
            # Past nn.Module's own setter: what a block does not own is neither saved, loaded nor counted with it.
            object.__setattr__(block.norm1, "emb", shared)
        self._initialize()

    @property
    def num_classes(self) -> int:
        """How many there are; also the label of no class."""
        return int(self.config["num_embeds_ada_norm"])

    def _initialize(self) -> None:
        """As the original does: blocks whose gates are 0 pass on what they get, and the first answer is 0."""
        patches: Any = self.pos_embed.proj
        blocks: Any = self.transformer_blocks
        embedding = blocks[0].norm1.emb
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(patches.weight.view(self.inner_dim, -1))
        nn.init.zeros_(patches.bias)
        for part in (
            embedding.class_embedder.embedding_table, embedding.timestep_embedder.linear_1,
            embedding.timestep_embedder.linear_2,
        ):  # fmt: skip
            nn.init.normal_(part.weight, std=0.02)
        for part in (self.proj_out_1, self.proj_out_2, *(block.norm1.linear for block in blocks)):
            nn.init.zeros_(part.weight)
