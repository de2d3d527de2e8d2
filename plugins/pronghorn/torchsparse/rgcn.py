"""Relational graph convolution as sparse convolution: a relation is an offset of the kernel, an edge a pair of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pronghorn.kernels.fetch_on_demand import fetch_on_demand
from pronghorn.torchsparse.defaults import settings

MEAN, SUM = "mean", "sum"
AGGREGATIONS = {"mean": MEAN, "sum": SUM, "add": SUM}
INDICES = (torch.int32, torch.int64)


class RelationGraph(NamedTuple):
    """Edges ordered by relation and then by target: built once, and given to every layer in place of the edges.

    Attributes:
        pairs: int32 [2, edges], sources and targets.
        starts: int32 [relations + 1], where the edges of each relation start.
        share: float32 [edges], 1 / number of edges of the same relation into the same target.
        nodes: number of sources and of targets.
    """

    pairs: Tensor
    starts: Tensor
    share: Tensor
    nodes: tuple[int, int]

    @classmethod
    def of(
        cls, edge_index: Tensor, edge_type: Tensor, *, num_relations: int, num_nodes: int | tuple[int, int]
    ) -> RelationGraph:
        """From edges in any order. Equal ones count as often as they stand there.

        Args:
            edge_index: int64 or int32 [2, edges], sources and targets.
            edge_type: int64 or int32 [edges], the relation of each.
            num_relations: number of relations.
            num_nodes: number of nodes, or of sources and of targets where these are others.

        Raises:
            ValueError, TypeError: a shape, dtype or device is wrong, or there is no such node or relation. Values are
                looked at in eager mode only: a graph that is compiled or captured cannot wait for them.
        """
        sources, targets = (num_nodes, num_nodes) if isinstance(num_nodes, int) else num_nodes
        if edge_index.dim() != 2 or edge_index.shape[0] != 2:
            raise ValueError(f"edge_index: got shape {tuple(edge_index.shape)}, wanted [2, edges]")
        if edge_type.shape != edge_index.shape[1:]:
            raise ValueError(f"edge_type: got shape {tuple(edge_type.shape)}, wanted [{edge_index.shape[1]}]")
        if edge_type.device != edge_index.device:
            raise ValueError(f"edge_type: is on {edge_type.device}, edge_index on {edge_index.device}")
        _check_values("edge_type", edge_type, num_relations)
        _check_values("edge_index[0]", edge_index[0], sources)
        _check_values("edge_index[1]", edge_index[1], targets)
        key, order = (edge_type.long() * targets + edge_index[1]).sort()
        count = torch.searchsorted(key, key, right=True) - torch.searchsorted(key, key)
        relations = torch.arange(num_relations + 1, device=key.device)
        starts = torch.searchsorted(key, relations * targets).int()
        return cls(edge_index[:, order].int(), starts, count.float().reciprocal(), (sources, targets))


def _check_values(name: str, values: Tensor, count: int) -> None:
    if values.dtype not in INDICES:
        raise TypeError(f"{name}: got {values.dtype}, wanted int32 or int64")
    if not values.numel() or torch.compiler.is_compiling() or _capturing():
        return
    low, high = torch.stack(values.aminmax()).tolist()
    if low < 0 or high >= count:
        raise ValueError(f"{name}: got {low} to {high}, wanted 0 to {count - 1}")


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class SparseRGCNConv(nn.Module):
    """y[i] = x[i] root + sum over relations r of the mean over its edges (j, i) of x[j] weight[r], + bias.

    Parameters have the names, shapes and first values of torch_geometric's `RGCNConv`, whose place it takes: state
    dicts load either way. The message of an edge is multiplied where it is added, so memory grows with nodes alone.

    Args:
        in_channels: input channels, or those of sources and of targets; the number of nodes where `x` is ids or None.
        out_channels: output channels.
        num_relations: number of relations.
        aggr: "mean" or "sum" (also "add") of the messages of each relation.
        root_weight: whether a node's own features are added, multiplied with a weight of their own.
        bias: whether there is one.
        num_bases: weights are sums of so many, each relation with coefficients of its own; by default they are free.

    Raises:
        ValueError: a size is not positive, or there is no such aggregation.

    Source: Schlichtkrull et al., Modeling Relational Data with Graph Convolutional Networks (arXiv 1703.06103); Tang et
    al., TorchSparse++ (MICRO 2023) for the way it is computed.
    """

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: int,
        num_relations: int,
        *,
        aggr: str = MEAN,
        root_weight: bool = True,
        bias: bool = True,
        num_bases: int | None = None,
    ) -> None:
        super().__init__()
        sizes = (in_channels, in_channels) if isinstance(in_channels, int) else tuple(in_channels)
        if aggr not in AGGREGATIONS:
            raise ValueError(f"aggr: got {aggr!r}, accepted are {', '.join(AGGREGATIONS)}")
        for name, value in (
            ("in_channels", min(sizes)), ("out_channels", out_channels), ("num_relations", num_relations),
            ("num_bases", 1 if num_bases is None else num_bases),
        ):  # fmt: skip
            if value < 1:
                raise ValueError(f"{name}: got {value}, wanted 1 or more")
        self.in_channels, self.out_channels, self.num_relations = in_channels, out_channels, num_relations
        self.num_bases, self.aggr, self.source_channels = num_bases, AGGREGATIONS[aggr], sizes[0]
        free = num_relations if num_bases is None else num_bases
        self.weight = nn.Parameter(torch.empty(free, sizes[0], out_channels))
        self.comp = None if num_bases is None else nn.Parameter(torch.empty(num_relations, num_bases))
        self.root = nn.Parameter(torch.empty(sizes[1], out_channels)) if root_weight else None
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot's uniform distribution for weights, zeros for the bias."""
        for parameter in (self.weight, self.comp, self.root):
            if parameter is not None:
                bound = (6 / (parameter.shape[-2] + parameter.shape[-1])) ** 0.5
                nn.init.uniform_(parameter, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        x: Tensor | tuple[Tensor | None, Tensor] | None,
        edge_index: Tensor | RelationGraph,
        edge_type: Tensor | None = None,
    ) -> Tensor:
        """Features of the targets.

        Args:
            x: [nodes, input channels]; or int64 [nodes], rows of the weights that stand for one-hot features; or None
                for all of them in order; or a pair of any of these, for sources and for targets.
            edge_index: int64 [2, edges], sources and targets. They are sorted at every call: a `RelationGraph` is
                faster, where layers or steps share one.
            edge_type: int64 [edges], the relation of each; None with a `RelationGraph`.

        Returns:
            [targets, output channels] in the dtype of the weights, or of autocast.

        Raises:
            ValueError, TypeError: shapes, dtypes or devices do not fit, or there is no such node or relation.
            RuntimeError: results are to be deterministic, and this is a GPU, where edges are added in any order.
        """
        source, target = x if isinstance(x, tuple) else (x, x)
        if source is None:
            source = torch.arange(self.source_channels, device=self.weight.device)
        target = source if target is None else target
        if settings.deterministic and source.is_cuda:
            raise RuntimeError("deterministic: relational graph convolution adds in any order on a GPU")
        graph = self._graph(edge_index, edge_type, (len(source), len(target)))
        out = self._messages(_as_computed(source), _as_computed(self._weight()), graph)
        if self.root is not None and target.is_floating_point():
            return out + functional.linear(target, self.root.T, self.bias)  # in the dtype of autocast by itself
        if self.root is not None:
            _check_values("x", target, len(self.root))
            out = out + self.root[target].to(out.dtype)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _graph(self, edges: Tensor | RelationGraph, edge_type: Tensor | None, nodes: tuple[int, int]) -> RelationGraph:
        if not isinstance(edges, RelationGraph):
            if edge_type is None:
                raise ValueError("edge_type: got None, wanted int64 [edges], or a RelationGraph for edge_index")
            return RelationGraph.of(edges, edge_type, num_relations=self.num_relations, num_nodes=nodes)
        if edge_type is not None:
            raise ValueError("edge_type: got a tensor, wanted None: the RelationGraph has the relations")
        if len(edges.starts) != self.num_relations + 1 or tuple(edges.nodes) != nodes:
            raise ValueError(
                f"edge_index: got a graph of {len(edges.starts) - 1} relations between {edges.nodes[0]} sources and "
                f"{edges.nodes[1]} targets, wanted {self.num_relations} between {nodes[0]} and {nodes[1]}"
            )
        return edges

    def _weight(self) -> Tensor:
        """[relations, input channels, output channels]."""
        if self.comp is None:
            return self.weight
        return (self.comp @ self.weight.flatten(1)).view(-1, *self.weight.shape[1:])

    def _messages(self, x: Tensor, weight: Tensor, graph: RelationGraph) -> Tensor:
        """[targets, output channels]: what edges bring."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        scale = graph.share.to(wide) if self.aggr == MEAN else None
        if x.is_floating_point():
            return fetch_on_demand(
                x, weight, graph.pairs, graph.starts, graph.nodes[1], scale=scale, tf32=settings.allow_tf32
            )
        _check_values("x", x, weight.shape[1])
        relation = torch.repeat_interleave(graph.starts.diff(), output_size=graph.pairs.shape[1])
        found = weight.flatten(0, 1)[relation * weight.shape[1] + x[graph.pairs[0]]].to(wide)
        found = found if scale is None else found * scale[:, None]
        return found.new_zeros(graph.nodes[1], weight.shape[2]).index_add(0, graph.pairs[1], found).to(weight.dtype)

    def extra_repr(self) -> str:
        """What it was made with."""
        return f"{self.in_channels}, {self.out_channels}, num_relations={self.num_relations}, aggr={self.aggr!r}"


def _as_computed(tensor: Tensor) -> Tensor:
    """In the dtype of autocast, where it is on."""
    if not tensor.is_floating_point() or not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
