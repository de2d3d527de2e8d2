"""Two layers of relational graph convolution against torch_geometric's, on graphs as large as AIFB, MUTAG and BGS.

torch_geometric has two layers, of which the faster one counts: one multiplies relation by relation, the other with a
weight of its own for every edge.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from harness import device, measure, row, write
from torch import Tensor, nn

from pronghorn.torchsparse.defaults import settings
from pronghorn.torchsparse.rgcn import RelationGraph, SparseRGCNConv

WIDTH = 64
LAYERS = 2
TURNS = 3
REACH = 2.6
PEERS = ("RGCNConv", "FastRGCNConv")
PRECISIONS = {"fp32": (torch.float32, False), "tf32": (torch.float32, True), "fp16": (torch.float16, False)}
# Largest difference, relative to the largest number; of the peer it is, that adds up in 16 bits where we do in 32.
TOLERANCE = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 3e-2}


class Graph(NamedTuple):
    """Sizes of a data set, with every edge in both directions."""

    nodes: int
    edges: int
    relations: int


GRAPHS = {"AIFB": Graph(8285, 58086, 90), "MUTAG": Graph(23644, 148454, 46), "BGS": Graph(333845, 1832398, 206)}


def main() -> None:
    """Measure and write the results."""
    if importlib.util.find_spec("torch_geometric") is None:
        sys.exit("torch_geometric is not there: pip install torch_geometric")
    import torch_geometric

    # Its segments know no relations: the mean would be over all edges of a node.
    torch_geometric.backend.use_segment_matmul = False
    names = GRAPHS if torch.cuda.is_available() else ["AIFB"]
    rows = []
    for name in names:
        for precision in PRECISIONS if torch.cuda.is_available() else ["fp32"]:
            with torch.inference_mode():
                rows += _measured(name, precision)
    write("rgcn", rows)


def edges(graph: Graph) -> tuple[Tensor, Tensor]:
    """Relations as unequal as words of a language, some nodes with many edges."""
    generator = torch.Generator().manual_seed(0)
    sizes = 1 / torch.arange(1, graph.relations + 1)
    kinds = torch.multinomial(sizes, graph.edges, replacement=True, generator=generator)
    ends = torch.rand(2, graph.edges, generator=generator) ** 2 * graph.nodes
    return ends.long().clamp(max=graph.nodes - 1).to(device()), kinds.to(device())


def _measured(name: str, precision: str) -> Iterator[dict[str, Any]]:
    graph = GRAPHS[name]
    dtype, tf32 = PRECISIONS[precision]
    settings.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    index, kinds = edges(graph)
    built = RelationGraph.of(index, kinds, num_relations=graph.relations, num_nodes=graph.nodes)
    x = torch.randn(graph.nodes, WIDTH, generator=torch.Generator().manual_seed(1)).to(device(), dtype)
    layers = [SparseRGCNConv(WIDTH, WIDTH, graph.relations).to(device(), dtype) for _ in range(LAYERS)]
    once, anew = partial(_forward, layers, x, built), partial(_forward, layers, x, index, kinds)
    peers = {peer: partial(_forward, _theirs(peer, layers), x, index, kinds) for peer in PEERS}
    checked = {peer: run for peer, run in peers.items() if _agrees(peer, run, once(), TOLERANCE[precision])}
    times = _best_of_turns({**checked, "once": once, "anew": anew})
    what = f"{LAYERS} RGCN layers, {precision}"
    shape = f"{name} nodes={graph.nodes} edges={graph.edges} relations={graph.relations} channels={WIDTH}"
    peer = f"torch_geometric {version('torch_geometric')}"
    if checked:
        best = min(checked, key=lambda peer: times[peer]["p50"])
        for ours, note, reach in (("once", "edges sorted once", REACH), ("anew", "edges sorted by each layer", None)):
            yield row(what, f"{peer} {best}", shape, times[ours], times[best], reach=reach, note=note)
    captured = _captured(checked.get("FastRGCNConv")) if torch.cuda.is_available() else None
    if captured:
        ours, against = measure(once, repeats=20), f"{peer} FastRGCNConv, CUDA graph"
        yield row(f"{what}, CUDA graph", against, shape, ours, captured, reach=REACH, note="edges sorted once")


def _best_of_turns(runs: dict[str, Callable[[], Any]]) -> dict[str, dict[str, float]]:
    """The best of several turns of each: launching takes longer than small graphs, and is disturbed at times."""
    found = [(name, measure(run, repeats=20, graphed=False)) for name, run in list(runs.items()) * TURNS]
    return {name: min((t for of, t in found if of == name), key=lambda t: t["p50"]) for name in runs}


def _forward(layers: list[nn.Module], x: Tensor, *given: Any) -> Tensor:
    for layer in layers:
        x = layer(x, *given).to(x.dtype).relu()  # RGCNConv adds to float32, and takes no such input with 16-bit weights
    return x


def _theirs(peer: str, layers: list[SparseRGCNConv]) -> list[nn.Module]:
    from torch_geometric import nn as geometric

    made = [getattr(geometric, peer)(WIDTH, WIDTH, layer.num_relations).to(layer.weight) for layer in layers]
    for their, our in zip(made, layers, strict=True):
        their.load_state_dict(our.state_dict())
    return made


def _agrees(peer: str, run: Callable[[], Tensor], wanted: Tensor, tolerance: float) -> bool:
    """Whether a peer runs at all, in the memory that there is."""
    try:
        found = run()
    except torch.cuda.OutOfMemoryError as error:
        print(f"{peer}: {error}")
        return False
    finally:
        _tidy()
    error = float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())
    if not error <= tolerance:
        raise RuntimeError(f"{peer}: differs by {error:.1e}, wanted {tolerance:.0e}")
    return True


def _captured(run: Callable[[], Tensor] | None) -> dict[str, float] | None:
    if run is None:
        return None
    _tidy()
    try:
        return measure(run, repeats=20)
    except RuntimeError as error:  # also where the graph's memory is too much
        print(f"no CUDA graph: {error}")
        return None
    finally:
        _tidy()


def _tidy() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
