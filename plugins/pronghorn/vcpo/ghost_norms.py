"""Norms of every trajectory's gradient from one backward over all of them, without making those gradients."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from pronghorn.kernels.ghost_norm_linear import ghost_norm_linear
from pronghorn.vcpo.norm_slopes import NormSlopes, is_own_rms_norm

KINDS = (nn.Embedding, nn.Linear, nn.LayerNorm, nn.RMSNorm)
AT_ONCE = 32  # layers whose squared norms are computed together: launches are few, and so are copies that wait


@dataclass(frozen=True)
class _Rows:
    """Where each trajectory's positions are in a flattened batch, and which are there, [trajectories, longest].

    Where each row of the batch is a trajectory, `index` is None: nothing is to be moved. `full` tells that
    nothing is missing.
    """

    trajectories: Tensor
    index: Tensor | None
    there: Tensor
    full: bool

    @classmethod
    def of(cls, trajectories: Tensor, count: int, device: torch.device) -> _Rows:
        """Of the trajectory of each position, [batch, positions]; -1 for none. On the CPU, so that nothing waits."""
        numbers = torch.arange(len(trajectories))[:, None]
        index = None
        if len(trajectories) == count and bool(((trajectories == numbers) | (trajectories == -1)).all()):
            there = trajectories != -1
        else:
            flat = trajectories.flatten()
            found = [(flat == number).nonzero()[:, 0] for number in range(count)]
            padded = nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=-1)
            index, there = padded.clamp(min=0).to(device), padded >= 0
        return cls(trajectories.to(device), index, there.to(device), bool(there.all()))

    def take(self, tensor: Tensor) -> Tensor:
        """[positions, ...] to [trajectories, longest, ...], anything where nothing is; or what is of that shape."""
        if self.index is not None:
            return tensor[self.index]
        return tensor if tensor.shape[:2] == self.there.shape else tensor.unflatten(0, self.there.shape)

    def cut(self, tensor: Tensor) -> Tensor:
        """Likewise, with zeros where nothing is; of [positions, width]."""
        taken = self.take(tensor)
        return taken if self.full else taken.masked_fill(~self.there[..., None], 0)

    def sums(self, tensor: Tensor) -> Tensor:
        """[positions, parts, width] to what each trajectory has in all, [trajectories, width], in float32 or better."""
        wide = torch.promote_types(tensor.dtype, torch.float32)
        if self.index is None and self.full:
            return tensor.reshape(len(self.there), -1, tensor.shape[-1]).sum(1, dtype=wide)
        return self.cut(tensor.sum(1, dtype=wide)).sum(1)

    def weights(self, weights: Tensor) -> Tensor:
        """[trajectories] to [positions, 1], zeros where nothing is."""
        return torch.cat([weights, weights.new_zeros(1)])[self.trajectories.flatten(), None]


@dataclass(frozen=True)
class _Use:
    """One call of a layer: what it saw, and the gradient of what it gave, of all positions."""

    module: Any
    seen: Tensor
    gradient: Tensor
    rows: _Rows

    def places(self, tensor: Tensor) -> Tensor:
        """[..., width] to [positions, width]; a position's heads, where a norm layer has them, side by side."""
        return tensor.reshape(self.rows.trajectories.numel(), -1)

    def product(self) -> _Product:
        """Of a linear layer."""
        if self.rows.index is None and self.seen.shape[:-1] == self.rows.there.shape:  # as it is nearly always
            return _Product(self.rows.cut(self.gradient), self.seen)
        return _Product(self.rows.cut(self.places(self.gradient)), self.rows.take(self.places(self.seen)))


@dataclass(frozen=True)
class _Product:
    """The gradient of a matrix, leftᵀ · right for each trajectory; an embedding's `left` is the numbers of its rows."""

    left: Tensor
    right: Tensor


class GhostNorms:
    """Records what a model's layers see, while it is entered, for the norms of a following backward.

    Linear layers (a LoRA adapter is two of them), embeddings, layer norms and RMS norms; a matrix that several layers
    share counts once. Trajectories may lie in a batch in any way, many in a row too, while none attends to another.
    The inputs of all layers that learn are kept, also under gradient checkpointing.

    Args:
        model: parameters that need no gradient are left out.

    Raises:
        TypeError: another kind of layer learns.

    Source: Li et al., Large Language Models Can Be Strong Differentially Private Learners (arXiv 2110.05679): for
    inputs a and gradients g of the outputs, ‖gᵀa‖² = ⟨a aᵀ, g gᵀ⟩.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # Names are looked up once, for hundreds of layers ask at every call; sharding changes what they name.
        self._learning = {module: names for module in model.modules() if (names := _learning_names(module))}
        for name, module in model.named_modules():
            if module in self._learning and not _known(module):
                raise TypeError(f"model: {name} is a {type(module).__name__}, accepted are linear layers, embeddings "
                                "without max_norm or scale_grad_by_freq, layer norms and RMS norms")  # fmt: skip
        self._slopes = NormSlopes(self._learning)
        self._handles: list[Any] = []
        self._recording = self._taking = self._checked = False
        self._clear()

    def _clear(self) -> None:
        self._uses: Counter[nn.Parameter] = Counter()
        self._sources: list[Tensor] = []
        self._vectors: dict[nn.Parameter, Tensor] = {}
        self._products: defaultdict[nn.Parameter, list[_Product]] = defaultdict(list)
        self._taken: list[_Use] = []
        self._waiting: list[_Product] = []
        self._suffixes: dict[tuple[int, ...], _Rows] = {}

    def __enter__(self) -> Self:
        self._clear()
        self._recording = True
        self._handles = [layer.register_forward_hook(self._record) for layer in self._learning]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._recording = False
        for handle in self._handles:
            handle.remove()
        self._clear()

    def _record(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if not self._recording or not output.requires_grad:
            return
        if len(inputs) != 1:
            raise TypeError(f"model: a {type(module).__name__} got {len(inputs)} positional inputs, wanted one")
        (seen,) = inputs
        for name in self._learning[module]:
            self._uses[getattr(module, name)] += 1
        if not seen.requires_grad:
            self._sources.append(output)
        output.register_hook(partial(self._take, module, seen.detach()))

    def norms(self, total: Tensor, trajectories: Tensor, count: int, *, keep_graph: bool = False) -> Tensor:
        """The norm of each trajectory's gradient.

        Args:
            total: the sum of what each trajectory's gradient is of, such as its log-probability; from a forward while
                this was entered.
            trajectories: which trajectory each position of the model's input belongs to, integers
                [batch, positions]; -1 for padding.
            count: the number of trajectories.
            keep_graph: for another backward.

        Returns:
            float64 [count].

        Raises:
            ValueError: a number is not of a trajectory, a layer saw other positions than those (a linear layer may have
                seen the last ones alone), or a parameter is used outside of its layer.
        """
        trajectories = trajectories.cpu()  # the device is waited for once, if they are there
        if trajectories.numel() and not -1 <= int(trajectories.min()) <= int(trajectories.max()) < count:
            raise ValueError(
                f"trajectories: got {int(trajectories.min())} to {int(trajectories.max())}, wanted -1 to {count - 1}"
            )
        self._trajectories, self._count = trajectories, count
        self._rows = _Rows.of(trajectories, count, total.device)
        self._squares = [torch.zeros(count, dtype=torch.float64, device=total.device)]
        if not self._checked:
            self._check_uses(total)
            self._checked = True
        self._recording, self._taking = False, True  # norm layers are run again below, and are not to be recorded
        try:
            # Nothing before these learns: no gradient of a weight is computed, only those of what layers gave.
            torch.autograd.grad(total, self._sources, retain_graph=keep_graph, allow_unused=True)
        finally:
            self._recording, self._taking = True, False
        self._square_waiting()
        vectors = [torch.cat([*self._vectors.values()], dim=1).double().square().sum(-1)] if self._vectors else []
        squares = torch.stack([*self._squares, *vectors]).sum(0)
        for products in self._products.values():
            for number, one in enumerate(products):
                squares = squares + sum(2 * _inner(one, another) for another in products[:number])
        return squares.clamp(min=0).sqrt()

    def weighted(self, weights: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Σ weight · gradient over trajectories, from what layers saw; after `norms`, and while this is entered.

        A trajectory's weight is a factor of all gradients that the backward came by, for none depends on another.

        Args:
            weights: [count].
            parameters: of the model.

        Returns:
            One for each parameter, of its dtype.
        """
        found: dict[Tensor, Tensor] = self._weighted_vectors(weights)
        scaled = _Scaled(weights)
        for use in self._taken:
            parameter = use.module.weight
            gradient = _weighted_gradient(use, scaled)
            found[parameter] = found[parameter] + gradient if parameter in found else gradient
        return [found[p] if p in found else torch.zeros_like(p) for p in parameters]

    def _weighted_vectors(self, weights: Tensor) -> dict[Tensor, Tensor]:
        if not self._vectors:
            return {}
        joined = torch.cat([*self._vectors.values()], dim=1)
        weighted = weights.to(joined) @ joined
        # Each dtype once: vectors are many and small.
        rounded = {dtype: weighted.to(dtype) for dtype in {parameter.dtype for parameter in self._vectors}}
        sizes = [sums.shape[1] for sums in self._vectors.values()]
        parts = {dtype: one.split(sizes) for dtype, one in rounded.items()}
        return {
            parameter: parts[parameter.dtype][place].view_as(parameter) for place, parameter in enumerate(self._vectors)
        }

    def _check_uses(self, total: Tensor) -> None:
        """Every way from the loss to a parameter leads through a layer that was recorded."""
        found: Counter[Tensor] = Counter()
        stack, seen = [total.grad_fn], {total.grad_fn}
        while stack:
            node = stack.pop()
            for following, _ in node.next_functions if node is not None else ():
                if hasattr(following, "variable"):
                    found[following.variable] += 1
                elif following is not None and following not in seen:
                    seen.add(following)
                    stack.append(following)
        for name, parameter in self._model.named_parameters():
            if found[parameter] > self._uses[parameter]:
                raise ValueError(f"model: {name} is used outside of its layer, where its gradient cannot be followed")

    def _take(self, module: nn.Module, seen: Tensor, gradient: Tensor) -> None:
        """One layer's share, as soon as the backward reaches it."""
        if not self._taking:  # a later backward over the same graph
            return
        use = _Use(module, seen, gradient.detach(), self._rows_seen_by(module, seen))
        for name in self._learning[module]:
            parameter = getattr(module, name)
            if name == "weight" and isinstance(module, nn.Linear):
                product = use.product()
            elif isinstance(module, nn.Embedding):
                product = _Product(use.rows.take(seen.flatten()), use.rows.cut(_embedded(use)))
            else:
                self._vector(parameter, use.rows.sums(self._vectors_of(use, name, parameter)))
                continue
            self._taken.append(use)
            self._matrix(parameter, product)

    def _rows_seen_by(self, module: nn.Module, seen: Tensor) -> _Rows:
        """Where trajectories are in what a layer saw."""
        trajectories = self._rows.trajectories
        shape = tuple(seen.shape if isinstance(module, nn.Embedding) else seen.shape[:-1])
        (batch, length), places = tuple(trajectories.shape), math.prod(shape)
        if isinstance(module, nn.Linear) and len(shape) == 2 and shape[0] == batch and shape[1] < length:
            # An output layer that is asked for logits of the last positions alone.
            if shape not in self._suffixes:
                last = self._trajectories[:, length - shape[1] :]
                self._suffixes[shape] = _Rows.of(last, self._count, seen.device)
            return self._suffixes[shape]
        in_rows, flat = shape[:2] == (batch, length), shape[:1] == (batch * length,)
        heads = places > batch * length and not isinstance(module, nn.Embedding | nn.Linear)
        if not (in_rows or flat) or (places != batch * length and not heads):
            raise ValueError(
                f"trajectories: got {[batch, length]}, but a {type(module).__name__} saw {list(seen.shape)}"
            )
        return self._rows

    def _vectors_of(self, use: _Use, name: str, parameter: nn.Parameter) -> Tensor:
        """The gradient of a vector by each position, [positions, heads that a norm layer has, width]."""
        found = use.gradient
        if name == "weight":
            found = self._slopes(use.module, use.seen) * found  # rounded as the layer rounds
        return found.reshape(use.rows.trajectories.numel(), -1, parameter.numel())

    def _vector(self, parameter: nn.Parameter, sums: Tensor) -> None:
        self._vectors[parameter] = self._vectors[parameter] + sums if parameter in self._vectors else sums

    def _matrix(self, parameter: nn.Parameter, product: _Product) -> None:
        self._waiting.append(product)
        if len(self._waiting) == AT_ONCE:
            self._square_waiting()
        if self._uses[parameter] > 1:
            self._products[parameter].append(product)

    def _square_waiting(self) -> None:
        """‖leftᵀ right‖² of each trajectory, of what waits."""
        linear = [product for product in self._waiting if product.left.dim() == 3]
        if linear:
            inputs, gradients = [product.right for product in linear], [product.left for product in linear]
            self._squares.append(ghost_norm_linear(inputs, gradients))
        self._squares += [_inner(product, product) for product in self._waiting if product.left.dim() != 3]
        self._waiting = []


def _learning_names(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.requires_grad]


def _embedded(use: _Use) -> Tensor:
    """The gradient of what an embedding gave, [positions, width], without those of its padding."""
    gradient = use.places(use.gradient)
    if use.module.padding_idx is None:
        return gradient
    return gradient * (use.seen.flatten() != use.module.padding_idx)[:, None]


class _Scaled:
    """What layers saw or the gradient of what they gave, times the weight of each position's trajectory.

    Args:
        weights: of trajectories.
    """

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights
        self._of_positions: dict[int, Tensor] = {}  # by rows, of which nearly all layers have the same
        self._last: tuple[Any, Tensor, Tensor] | None = None  # with what was multiplied, so that its place stays taken

    def __call__(self, tensor: Tensor, rows: _Rows) -> Tensor:
        """[positions, width]. Layers that see the same follow each other: that is multiplied once."""
        key = tensor.data_ptr(), tensor.shape, tensor.dtype, id(rows)
        if self._last is None or self._last[0] != key:
            if id(rows) not in self._of_positions:
                wide = torch.promote_types(tensor.dtype, torch.float32)
                self._of_positions[id(rows)] = rows.weights(self._weights.to(tensor.device, wide))
            # Rounds once, in one pass.
            product = torch.mul(tensor, self._of_positions[id(rows)], out=torch.empty_like(tensor))
            self._last = key, tensor, product
        return self._last[-1]


def _weighted_gradient(use: _Use, scaled: _Scaled) -> Tensor:
    """Σ weight · gradient of a matrix in one call."""
    parameter = use.module.weight
    if isinstance(use.module, nn.Embedding):
        rows = scaled(_embedded(use), use.rows).to(parameter.dtype)
        return torch.zeros_like(parameter).index_add_(0, use.seen.flatten(), rows)
    gradient = use.places(use.gradient)
    seen = use.places(use.seen).to(gradient.dtype)
    # The narrower is multiplied, for that is memory's work.
    if gradient.shape[1] < seen.shape[1]:
        gradient = scaled(gradient, use.rows)
    else:
        seen = scaled(seen, use.rows)
    product: Tensor = gradient.T @ seen
    return product.to(parameter.dtype)


def _known(module: nn.Module) -> bool:
    """Whether it is of a kind whose gradients are known; a subclass that computes otherwise is not."""
    if {name for name, _ in module.named_parameters(recurse=False)} - {"weight", "bias"}:
        return False
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
        return False
    return is_own_rms_norm(module) or any(type(module).forward is kind.forward for kind in KINDS)


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _inner(one: _Product, another: _Product) -> Tensor:
    """⟨leftᵀ right, leftᵀ right⟩ of two uses of a matrix, [trajectories]."""
    if one.left.dim() < another.left.dim():
        return _inner(another, one)
    if another.left.dim() == 3:
        left = _precise(one.left) @ _precise(another.left).mT
    elif one.left.dim() == 3:
        left = one.left.gather(2, another.left[:, None].expand(-1, one.left.shape[1], -1))
    else:
        left = one.left[:, :, None] == another.left[:, None]
    return (left * (_precise(one.right) @ _precise(another.right).mT)).double().sum((1, 2))
