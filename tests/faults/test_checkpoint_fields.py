"""Checkpoints of others, without a digest, with one tensor that is not as it should be: refused, the tensor named."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.faults.loaders import LOADERS
from tests.faults.test_loaders import REFUSED, same

ONE_OF_A_KIND = 6  # tensors of a checkpoint whose every mutation the push run tries


def set_first(value):
    def changed(tensor):
        found = tensor.clone()
        found.view(-1)[0] = value
        return found

    return changed


def kind_of(tensor):
    return tensor.float() if not tensor.is_floating_point() else torch.ones(tensor.shape, dtype=torch.int32)


MUTATIONS = {
    "missing": lambda name, tensor: {},
    "renamed": lambda name, tensor: {f"{name}_": tensor},
    "extra": lambda name, tensor: {name: tensor, f"{name}_": tensor.clone()},
    "shape": lambda name, tensor: {name: torch.cat([tensor.reshape(-1), tensor.reshape(-1)[:1]])},
    "dtype": lambda name, tensor: {name: kind_of(tensor)},
    "NaN": lambda name, tensor: {name: set_first(float("nan"))(tensor)} if tensor.is_floating_point() else None,
    "zero": lambda name, tensor: {name: set_first(0.0)(tensor)} if name.endswith(".scales") else None,
    "negative": lambda name, tensor: {name: set_first(-1.0)(tensor)} if name.endswith((".scales", "var")) else None,
    "beyond the codes": lambda name, tensor: {name: set_first(255)(tensor)} if name.endswith(".qzeros") else None,
}
# What a host only warns of: tensors of which neither it nor we know anything.
TOLERATED = {"awq in transformers": re.compile(r"(norm|embed_tokens|lm_head)[^ ]*_$")}
# "awq in vLLM" reads no weight by itself, vLLM's loader does: of its tensors tests/plugins/awq/test_vllm*.py tell.
CHECKPOINTS = {
    "awq in transformers": ("model.layers.0.self_attn.q_proj", "model.norm", "model.embed_tokens"),
    "awq convert": ("model.layers.0.self_attn.q_proj",),
    "dcae, official layout": ("encoder.project_in", "decoder.project_out"),
    "dcae in diffusers": ("encoder.conv_in", "decoder.norm_out", "encoder.down_blocks.0.0.norm", "decoder.up_blocks.0"),
    "dcae diffusion model": ("pos_embed", "mid_block.norm1"),
    "trl lagged sampler": ("0.0", "1.1"),
    "vlash trained policy": ("",),
}
# Of AWQ alone: what is not packed passes through a conversion as it is.
CONVERTED = ("qweight", "scales", "qzeros")


def unsealed(folder):
    """The files without their digests, as another program writes them."""
    (folder / "pronghorn.json").unlink(missing_ok=True)
    for path in folder.glob("*.safetensors"):
        save_file(load_file(path), path, metadata={"format": "pt"})


def fields(name, tmp_path):
    entry = LOADERS[name]
    folder = tmp_path / "files"
    folder.mkdir()
    torch.manual_seed(0)
    entry.write(folder)
    wanted = entry.read(folder)
    unsealed(folder)
    assert same(entry.read(folder), wanted)  # the unfaulted run passes
    for path in sorted(folder.glob("*.safetensors")):
        for key in load_file(path):
            if name != "awq convert" or key.endswith(CONVERTED):
                yield path, key
    assert same(entry.read(folder), wanted)


def refused(name, path, key, kind):
    """Whether a mutation could be made; it is refused then, and the error names the tensor."""
    content, entry = load_file(path), LOADERS[name]
    changed = MUTATIONS[kind](key, content[key])
    if changed is None or (name in TOLERATED and any(TOLERATED[name].search(new) for new in changed)):
        return False
    if name == "awq convert" and kind == "extra":
        return False  # a name that is none of a packed linear's is passed on
    rest = {other: tensor for other, tensor in content.items() if other != key}
    save_file({**rest, **{new: tensor.contiguous() for new, tensor in changed.items()}}, path, {"format": "pt"})
    try:
        with pytest.raises(REFUSED) as caught:
            entry.read(path.parent)
    finally:
        save_file(content, path, {"format": "pt"})
    keys = {key, *changed}
    if name == "dcae, official layout":
        keys.update(*(names_of_the_model(one, content[key]) for one in [*keys]))
    assert names(keys, str(caught.value)), (key, kind, str(caught.value))
    return True


def names_of_the_model(key, tensor):
    """What diffusers' model calls a weight of the official layout, if it has it."""
    from pronghorn.dcae.convert import to_diffusers

    try:
        return [*to_diffusers({key: tensor})]
    except ValueError:
        return []


def names(keys, said):
    """Whether an error names one of these tensors: by its key, or by layer and tensor; neither a part of another's."""
    whole = {word.strip(".") for word in re.findall(r"[\w.]+", said)}
    parts = [key.rpartition(".") for key in keys]
    return not whole.isdisjoint(keys) or any(layer in whole and tensor in whole for layer, _, tensor in parts if layer)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ("x.safetensors: layers.1.q_proj.scales: got 0", True),
        ("layers.1.q_proj: missing scales, qweight.", True),
        ("x.safetensors: got 4 weights, wanted 4", False),
        ("layers.1.q_proj: missing", False),
        ("layers.11.q_proj.scales: got 0", False),
        ("layers.1.q_proj.scales_more: got 0", False),
    ],
)
def test_what_names_a_tensor(said, named):
    assert names({"layers.1.q_proj.scales"}, said) == named


@pytest.mark.fault(2)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_field_of_each_kind(tmp_path, name, figure):
    count, seen = 0, set()
    for path, key in fields(name, tmp_path):
        if key.startswith(CHECKPOINTS[name]) and len(seen) < ONE_OF_A_KIND:
            seen.add(key)
            count += sum(refused(name, path, key, kind) for kind in MUTATIONS)
    assert count >= len(seen) > 0
    figure("mutations", count)


@pytest.mark.slow
@pytest.mark.fault(2)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_each_field(tmp_path, name, figure):
    count = sum(refused(name, path, key, kind) for path, key in fields(name, tmp_path) for kind in MUTATIONS)
    assert count > 0
    figure("mutations", count)


@pytest.mark.fault(2)
def test_a_permuted_packing_is_found_by_the_digest(tmp_path):
    """Codes in another order are codes: only the digest of a sealed checkpoint tells."""
    entry = LOADERS["awq in transformers"]
    entry.write(tmp_path)
    path = next(path for path in tmp_path.glob("*.safetensors") if any("qweight" in key for key in load_file(path)))
    content = load_file(path)
    key = next(key for key in content if key.endswith("qweight"))
    save_file({**content, key: content[key].flip(0)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{path.name}: damaged or changed"):
        entry.read(tmp_path)
