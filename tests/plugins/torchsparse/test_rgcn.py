"""Relational graph convolution against a loop over edges in float64, and against torch_geometric where it is there."""

import pytest
import torch
from tests.kernels.harness import backend

from pronghorn.torchsparse.defaults import settings
from pronghorn.torchsparse.rgcn import RelationGraph, SparseRGCNConv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NODES, RELATIONS, IN, OUT = 12, 5, 6, 4


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(settings, "allow_tf32", False)


def edges(count=60, sources=NODES, targets=NODES):
    """With relation 2 in none, and two equal ones."""
    index = torch.stack([torch.randint(sources, (count,)), torch.randint(targets, (count,))])
    kinds = torch.randint(RELATIONS, (count,))
    kinds[kinds == 2] = 3
    index[:, :2], kinds[:2] = index[:, :1].clone(), kinds[0]
    return index.to(DEVICE), kinds.to(DEVICE)


def layer(**knobs):
    made = SparseRGCNConv(knobs.pop("in_channels", IN), OUT, RELATIONS, **knobs).to(DEVICE)
    if made.bias is not None:
        torch.nn.init.normal_(made.bias)
    return made


def naive(made, source, target, index, kinds):
    """float64 on the CPU, edge by edge."""
    cpu = {name: value.detach().double().cpu() for name, value in made.named_parameters()}
    weight = cpu["weight"]
    if "comp" in cpu:
        weight = torch.einsum("rb,bio->rio", cpu["comp"], weight)
    source, target, index, kinds = source.double().cpu(), target.double().cpu(), index.cpu(), kinds.cpu()
    out = torch.zeros(len(target), OUT, dtype=torch.float64)
    for i in range(len(target)):
        for r in range(RELATIONS):
            chosen = (index[1] == i) & (kinds == r)
            if chosen.any():
                messages = source[index[0, chosen]] @ weight[r]
                out[i] += messages.mean(dim=0) if made.aggr == "mean" else messages.sum(dim=0)
    if "root" in cpu:
        out += target @ cpu["root"]
    return out + cpu.get("bias", 0)


def close(found, wanted, tolerance=1e-5):
    assert found.shape == wanted.shape
    assert (found.detach().double().cpu() - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize(
    "knobs", [{}, {"aggr": "sum"}, {"aggr": "add"}, {"root_weight": False}, {"bias": False}, {"num_bases": 3}], ids=str
)
@pytest.mark.parametrize("which", ["reference", "triton"])
def test_is_what_the_formula_says(knobs, which):
    made, (index, kinds), x = layer(**knobs), edges(), torch.randn(NODES, IN, device=DEVICE)
    with backend(which):
        close(made(x, index, kinds), naive(made, x, x, index, kinds))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 3e-2)])
def test_narrow_types(dtype, tolerance):
    made, (index, kinds) = layer().to(dtype), edges()
    x = torch.randn(NODES, IN, device=DEVICE, dtype=dtype)
    found = made(x, index, kinds)
    assert found.dtype == dtype
    close(found, naive(made, x, x, index, kinds), tolerance)


def test_autocast():
    made, (index, kinds), x = layer(), edges(), torch.randn(NODES, IN, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = made(x, index, kinds)
    assert found.dtype == torch.bfloat16
    close(found, naive(made, x, x, index, kinds), 3e-2)
    found.float().sum().backward()
    assert made.weight.grad.dtype == torch.float32


def test_the_order_of_edges_does_not_matter():
    made, (index, kinds), x = layer(), edges(), torch.randn(NODES, IN, device=DEVICE)
    order = torch.randperm(len(kinds), device=DEVICE)
    torch.testing.assert_close(made(x, index, kinds), made(x, index[:, order], kinds[order]))


def test_a_graph_is_built_once():
    made, (index, kinds), x = layer(), edges(), torch.randn(NODES, IN, device=DEVICE)
    graph = RelationGraph.of(index, kinds, num_relations=RELATIONS, num_nodes=NODES)
    torch.testing.assert_close(made(x, graph), made(x, index, kinds))
    pairs, starts = graph.pairs.long(), graph.starts.long()
    assert starts.diff().tolist() == kinds.bincount(minlength=RELATIONS).tolist()
    relation = torch.repeat_interleave(starts.diff())
    assert sorted(zip(*pairs.tolist(), relation.tolist(), strict=True)) == sorted(
        zip(*index.tolist(), kinds.tolist(), strict=True)
    )
    assert ((relation * NODES + pairs[1]).diff() >= 0).all()
    narrow = RelationGraph.of(index.int(), kinds.int(), num_relations=RELATIONS, num_nodes=NODES)
    assert [found.dtype for found in narrow[:2]] == [torch.int32] * 2
    torch.testing.assert_close(made(x, narrow), made(x, graph))


def test_sources_and_targets_of_their_own():
    made, (index, kinds) = layer(in_channels=(IN, 3)), edges(sources=9, targets=7)
    x = torch.randn(9, IN, device=DEVICE), torch.randn(7, 3, device=DEVICE)
    close(made(x, index, kinds), naive(made, *x, index, kinds))


@pytest.mark.parametrize("aggr", ["mean", "sum"])
@pytest.mark.parametrize("num_bases", [None, 2])
def test_nodes_without_features_are_one_hot(aggr, num_bases):
    made, (index, kinds) = layer(in_channels=NODES, aggr=aggr, num_bases=num_bases), edges()
    features = torch.eye(NODES, device=DEVICE)
    close(made(None, index, kinds), naive(made, features, features, index, kinds))
    ids = torch.randperm(NODES, device=DEVICE)
    close(made(ids, index, kinds), naive(made, features[ids], features[ids], index, kinds))


def test_a_graph_without_edges():
    made, x = layer(), torch.randn(NODES, IN, device=DEVICE)
    index, kinds = torch.zeros(2, 0, dtype=torch.int64, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    close(made(x, index, kinds), naive(made, x, x, index, kinds))
    assert made(x[:0], index, kinds).shape == (0, OUT)
    embedding = layer(in_channels=NODES)
    torch.testing.assert_close(embedding(None, index, kinds), embedding.root + embedding.bias)


@pytest.mark.parametrize("knobs", [{}, {"aggr": "sum"}, {"num_bases": 2}], ids=str)
def test_gradients(knobs):
    made, (index, kinds) = layer(**knobs).double(), edges(15)
    names = [name for name, _ in made.named_parameters()]

    def call(x, *values):
        return torch.func.functional_call(made, dict(zip(names, values, strict=True)), (x, index, kinds))

    x = torch.randn(NODES, IN, dtype=torch.float64, device=DEVICE, requires_grad=True)
    values = [value.detach().requires_grad_() for value in made.parameters()]
    assert torch.autograd.gradcheck(call, (x, *values), nondet_tol=1e-9)  # a GPU adds in any order


def test_compiles_with_a_graph_of_its_own():
    made, (index, kinds), x = layer(), edges(), torch.randn(NODES, IN, device=DEVICE)
    graph = RelationGraph.of(index, kinds, num_relations=RELATIONS, num_nodes=NODES)
    for given in ((graph,), (index, kinds)):
        compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, *given), made(x, *given))


def test_it_learns():
    """To tell, of two relations, in which one a node has its edge."""
    index, kinds = torch.randint(NODES, (2, NODES), device=DEVICE), torch.randint(2, (NODES,), device=DEVICE)
    index[1] = torch.arange(NODES, device=DEVICE)
    first, last, x = SparseRGCNConv(IN, 8, 2).to(DEVICE), SparseRGCNConv(8, 2, 2).to(DEVICE), torch.ones(NODES, IN)
    optimizer = torch.optim.Adam([*first.parameters(), *last.parameters()], lr=0.05)
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(last(first(x.to(DEVICE), index, kinds).relu(), index, kinds), kinds)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


INDEX, KINDS = torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 4])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ((torch.zeros(5, IN), INDEX[0], KINDS), ValueError, r"^edge_index: got shape \(2,\), wanted \[2, edges\]"),
        ((torch.zeros(5, IN), INDEX[:, [0, 1, 1]], KINDS), ValueError, r"^edge_type: got shape \(2,\), wanted \[3\]"),
        ((torch.zeros(5, IN), INDEX.float(), KINDS), TypeError, r"^edge_index\[0\]: got torch.float32, wanted int32"),
        ((torch.zeros(5, IN), INDEX, KINDS.float()), TypeError, "^edge_type: got torch.float32, wanted int32 or int64"),
        ((torch.zeros(5, IN), INDEX, KINDS + 1), ValueError, "^edge_type: got 1 to 5, wanted 0 to 4"),
        ((torch.zeros(5, IN), INDEX, KINDS - 1), ValueError, "^edge_type: got -1 to 3, wanted 0 to 4"),
        ((torch.zeros(3, IN), INDEX, KINDS), ValueError, r"^edge_index\[1\]: got 2 to 3, wanted 0 to 2"),
        ((torch.zeros(5, IN), INDEX - 1, KINDS), ValueError, r"^edge_index\[0\]: got -1 to 0, wanted 0 to 4"),
        ((torch.zeros(5, IN + 1), INDEX, KINDS), ValueError, r"^x: got shape \(5, 7\), wanted \(5, 6\)"),
        ((torch.zeros(5, IN).double(), INDEX, KINDS), TypeError, "^weight: got torch.float32, wanted torch.float64"),
        ((torch.zeros(5, IN), INDEX, None), ValueError, "^edge_type: got None"),
        ((torch.arange(5) + 2, INDEX, KINDS), ValueError, "^x: got 2 to 6, wanted 0 to 5"),
    ],
)
def test_wrong_arguments_name_themselves(call, error, message):
    made = layer()
    call = [value if value is None else value.to(DEVICE) for value in call]
    with pytest.raises(error, match=message):
        made(*call)


def test_graphs_of_other_sizes_are_refused():
    made, (index, kinds) = layer(), edges()
    graph = RelationGraph.of(index, kinds, num_relations=RELATIONS, num_nodes=NODES)
    with pytest.raises(ValueError, match=r"^edge_index: got a graph of 5 relations between 12 sources and 12 targets"):
        made(torch.zeros(NODES + 1, IN, device=DEVICE), graph)
    with pytest.raises(ValueError, match=r"^edge_type: got a tensor, wanted None"):
        made(torch.zeros(NODES, IN, device=DEVICE), graph, kinds)
    more = RelationGraph.of(index, kinds, num_relations=RELATIONS + 1, num_nodes=NODES)
    with pytest.raises(ValueError, match="wanted 5 between 12 and 12"):
        made(torch.zeros(NODES, IN, device=DEVICE), more)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"aggr": "max"}, "^aggr: got 'max', accepted are mean, sum, add"),
        ({"in_channels": 0}, "^in_channels: got 0"),
        ({"num_bases": 0}, "^num_bases: got 0"),
    ],
)
def test_wrong_settings_name_themselves(knobs, message):
    with pytest.raises(ValueError, match=message):
        layer(**knobs)


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU adds in order")
def test_deterministic_on_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(settings, "deterministic", True)
    with pytest.raises(RuntimeError, match=r"^deterministic: "):
        layer()(torch.zeros(NODES, IN, device=DEVICE), *edges())


@pytest.mark.parametrize("kind", ["RGCNConv", "FastRGCNConv"])
@pytest.mark.parametrize(
    "knobs",
    [{}, {"aggr": "sum"}, {"root_weight": False}, {"bias": False}, {"num_bases": 3}, {"in_channels": (IN, 3)}],
    ids=str,
)
def test_takes_the_place_of_torch_geometrics(kind, knobs, monkeypatch):
    geometric = pytest.importorskip("torch_geometric")
    monkeypatch.setattr(geometric.backend, "use_segment_matmul", False)  # its mean is over all relations together
    knobs = {"in_channels": IN, **knobs}
    torch.manual_seed(1)
    theirs = getattr(geometric.nn, kind)(out_channels=OUT, num_relations=RELATIONS, **knobs).to(DEVICE)
    torch.manual_seed(1)
    ours = SparseRGCNConv(out_channels=OUT, num_relations=RELATIONS, **knobs).to(DEVICE)
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)
    ours.load_state_dict(theirs.state_dict())
    index, kinds = edges()
    wide = isinstance(knobs["in_channels"], tuple)
    x = torch.randn(NODES, IN, device=DEVICE)
    x = (x, torch.randn(NODES, 3, device=DEVICE)) if wide else x
    torch.testing.assert_close(ours(x, index, kinds), theirs(x, index, kinds), rtol=1e-5, atol=1e-5)
    if not wide:
        made = [cls(NODES, OUT, RELATIONS).to(DEVICE) for cls in (SparseRGCNConv, getattr(geometric.nn, kind))]
        made[0].load_state_dict(made[1].state_dict())
        torch.testing.assert_close(made[0](None, index, kinds), made[1](None, index, kinds), rtol=1e-5, atol=1e-5)
