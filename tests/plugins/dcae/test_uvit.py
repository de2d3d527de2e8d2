"""UViT as a diffusers model."""

import pytest
import torch

from pronghorn.dcae.diffusers import SIZES, UViT2DModel, guided

TINY = {"sample_size": 4, "patch_size": 2, "in_channels": 3, "hidden_size": 16, "depth": 4, "num_attention_heads": 2,
        "num_classes": 5}  # fmt: skip


def tiny():
    torch.manual_seed(0)
    return UViT2DModel(**TINY)


def given():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 4, 4, generator=generator), torch.tensor([3.0, 700.0]), torch.tensor([0, 5])


@pytest.mark.parametrize(("size", "millions"), [("S", 44.789), ("H", 500.869), ("2B", 1580.397)])
def test_published_sizes(size, millions):
    depth, hidden_size, heads = SIZES[size]
    with torch.device("meta"):
        model = UViT2DModel(depth=depth, hidden_size=hidden_size, num_attention_heads=heads)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.001)


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    again = UViT2DModel.from_pretrained(tmp_path)
    assert torch.equal(model(*given()).sample, again(*given()).sample)
    assert torch.equal(model(*given(), return_dict=False)[0], model(*given()).sample)


def test_checkpointing_changes_no_gradient():
    grads = []
    for checkpointed in (False, True):
        model = tiny().train()
        if checkpointed:
            model.enable_gradient_checkpointing()
        model(*given()).sample.square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@torch.no_grad()
def graphs_of_blocks(model, *given):
    """What the compiler is handed of a model whose blocks are compiled, and which then computes the same."""
    torch.compiler.reset()
    wanted, graphs = model(*given).sample, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model.compile_repeated_blocks(backend=backend, fullgraph=True)
    assert torch.equal(model(*given).sample, wanted)
    return graphs


def test_blocks_compile_to_a_graph_for_each_kind():
    assert len(graphs_of_blocks(tiny(), *given())) == 2  # with a skip and without, however many blocks


@torch.no_grad()
def test_guidance_of_one_is_the_class_itself():
    model = tiny().eval()
    sample, time, labels = given()
    torch.testing.assert_close(guided(model, sample, time, labels, 1.0), model(sample, time, labels).sample)
    none = model(sample, time, torch.full_like(labels, 5)).sample
    torch.testing.assert_close(guided(model, sample, time, labels, 0.0), none)


def test_bad_input_is_named():
    model = tiny()
    sample, time, labels = given()
    with pytest.raises(ValueError, match="sample: got"):
        model(sample[:, :2], time, labels)
    with pytest.raises(ValueError, match="class_labels: got"):
        model(sample, time, labels[:1])
    with pytest.raises(ValueError, match="patch_size: got 3"):
        UViT2DModel(**{**TINY, "patch_size": 3})
    with pytest.raises(ValueError, match="num_attention_heads: got 3"):
        UViT2DModel(**{**TINY, "num_attention_heads": 3})


@torch.no_grad()
@pytest.mark.parametrize(("changes", "wanted"), [({}, torch.float32), ({"upcast_attention": False}, torch.bfloat16)])
def test_precision_of_attention(changes, wanted, monkeypatch):
    seen, attend = [], torch.nn.functional.scaled_dot_product_attention

    def noted(q, k, v):
        seen.extend((q.dtype, k.dtype, v.dtype))
        return attend(q, k, v)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    model, (sample, time, labels) = UViT2DModel(**TINY, **changes).bfloat16(), given()
    assert model(sample.bfloat16(), time, labels).sample.dtype == torch.bfloat16
    assert set(seen) == {wanted}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):  # which has its own, and would take float32 back
        model.float()(sample, time, labels)
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    model.double()(sample.double(), time, labels)
    assert set(seen) == {torch.float64}
