"""A small pi0 or pi0.5 of our own, without a vision tower: for tests, reference data and models without LeRobot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pronghorn.vlash.pi.suffix import PI0, PI05, add_delay_condition, add_state_condition


@dataclass(frozen=True)
class PiSizes:
    """Sizes of a model; the defaults are those of the published ones.

    Attributes:
        kind: "pi0" or "pi05".
        depth: layers of both experts.
        heads: of queries.
        kv_heads: of keys and values.
        head_dim: of all heads.
        prefix_width: of the expert that sees images and text.
        prefix_mlp: its feed-forward's inner width.
        width: of the expert for actions.
        mlp: its feed-forward's inner width.
        vocab: tokens of the text.
        state_dim: coordinates of a state, padding included.
        action_dim: coordinates of an action, padding included.
        rope_theta: base of the rotary positions.
        eps: of the norms.
    """

    kind: str = PI05
    depth: int = 18
    heads: int = 8
    kv_heads: int = 1
    head_dim: int = 256
    prefix_width: int = 2048
    prefix_mlp: int = 16384
    width: int = 1024
    mlp: int = 4096
    vocab: int = 257152
    state_dim: int = 32
    action_dim: int = 32
    rope_theta: float = 10000.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.kind not in (PI0, PI05):
            raise ValueError(f"kind: got {self.kind!r}, accepted are {PI0}, {PI05}")
        if self.heads % self.kv_heads or self.head_dim % 2 or self.width % 2:
            raise ValueError(
                f"kv_heads, head_dim, width: got {self.kv_heads}, {self.head_dim}, {self.width}, wanted a divisor of "
                f"heads, {self.heads}, and even sizes"
            )


class RMSNorm(nn.Module):
    """RMS norm whose weight is an offset from 1."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[..., width], computed at least in float32; and no gate."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        unit = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (unit * (1 + self.weight.to(unit))).to(x.dtype), None


class AdaptiveRMSNorm(nn.Module):
    """The projection of a condition to scale, shift and gate; `gemma` computes with it."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.dense = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.dense.weight)


class Attention(nn.Module):
    """The four projections of an attention."""

    def __init__(self, sizes: PiSizes, width: int) -> None:
        super().__init__()
        self.head_dim = sizes.head_dim
        self.q_proj = nn.Linear(width, sizes.heads * sizes.head_dim, bias=False)
        self.k_proj = nn.Linear(width, sizes.kv_heads * sizes.head_dim, bias=False)
        self.v_proj = nn.Linear(width, sizes.kv_heads * sizes.head_dim, bias=False)
        self.o_proj = nn.Linear(sizes.heads * sizes.head_dim, width, bias=False)


class FeedForward(nn.Module):
    """The three projections of a gated feed-forward."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)


class GemmaLayer(nn.Module):
    """The parts of a layer; `gemma` computes with them."""

    def __init__(self, sizes: PiSizes, width: int, inner: int, *, adaptive: bool) -> None:
        super().__init__()
        norm = AdaptiveRMSNorm if adaptive else RMSNorm
        self.input_layernorm = norm(width, sizes.eps)
        self.self_attn = Attention(sizes, width)
        self.post_attention_layernorm = norm(width, sizes.eps)
        self.mlp = FeedForward(width, inner)


class Expert(nn.Module):
    """A stack of layers and its last norm, with embeddings of text where `vocab` is given."""

    def __init__(
        self, sizes: PiSizes, width: int, inner: int, *, adaptive: bool = False, vocab: int | None = None
    ) -> None:
        super().__init__()
        if vocab is not None:
            self.embed_tokens = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(GemmaLayer(sizes, width, inner, adaptive=adaptive) for _ in range(sizes.depth))
        self.norm = (AdaptiveRMSNorm if adaptive else RMSNorm)(width, sizes.eps)


class SuffixEmbedder(nn.Module):
    """The projections that make tokens and conditions of actions, times and states; `suffix` computes with them."""

    def __init__(self, sizes: PiSizes) -> None:
        super().__init__()
        width = sizes.width
        self.action_in_proj = nn.Linear(sizes.action_dim, width)
        if sizes.kind == PI0:
            self.state_proj = nn.Linear(sizes.state_dim, width)
            self.action_time_mlp_in = nn.Linear(2 * width, width)
            self.action_time_mlp_out = nn.Linear(width, width)
        else:
            self.time_mlp_in = nn.Linear(width, width)
            self.time_mlp_out = nn.Linear(width, width)


class PiNetwork(nn.Module):
    """The parameters of a pi0 or pi0.5 under the names of the authors' checkpoints; `adapt.pi_model` runs it.

    Args:
        sizes: of the model.
        state_cond: pi0.5 sees the state through its norms; starts without effect.
        max_delay_steps: where given, the model is told the delay, up to this; starts without effect.

    Raises:
        ValueError: `state_cond` with pi0, which has a token for the state.
    """

    def __init__(self, sizes: PiSizes, *, state_cond: bool = False, max_delay_steps: int | None = None) -> None:
        super().__init__()
        self.sizes = sizes
        language = Expert(sizes, sizes.prefix_width, sizes.prefix_mlp, vocab=sizes.vocab)
        self.vlm = nn.ModuleDict({"model": nn.ModuleDict({"language_model": language})})
        self.action_expert = nn.ModuleDict(
            {"model": Expert(sizes, sizes.width, sizes.mlp, adaptive=sizes.kind == PI05)}
        )
        self.suffix_embedder = SuffixEmbedder(sizes)
        self.action_out_proj = nn.Linear(sizes.width, sizes.action_dim)
        if state_cond:
            add_state_condition(self.suffix_embedder, sizes.state_dim)
        if max_delay_steps is not None:
            add_delay_condition(self.suffix_embedder, max_delay_steps)

    @property
    def language_model(self) -> Expert:
        """The expert that sees images and text."""
        return self.vlm["model"]["language_model"]  # type: ignore[index]

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Text tokens [batch, L] as [batch, L, prefix_width], times the root of the width as Gemma has it."""
        table = self.language_model.embed_tokens
        return table(tokens) * table.embedding_dim**0.5
