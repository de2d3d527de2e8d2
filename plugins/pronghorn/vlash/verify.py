"""Replays what the authors' code computed (`golden/vlash`), file by file."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pronghorn.verification import Check
from pronghorn.vlash.offsets import (
    OffsetSamples,
    all_offsets,
    apply_offset,
    collate,
    draw_offset,
    offset_indices,
    state_index,
)
from pronghorn.vlash.pi.adapt import pi_model
from pronghorn.vlash.pi.keys import lerobot_name, vlash_name
from pronghorn.vlash.pi.layers import PiNetwork, PiSizes
from pronghorn.vlash.pi.model import PiModel, Prefix
from pronghorn.vlash.pi.normalization import IDENTITY, STATISTICS, normalize, unnormalize
from pronghorn.vlash.pi.preprocessing import resize_with_padding, sincos, state_bins, to_model_range
from pronghorn.vlash.pi.suffix import PI0
from pronghorn.vlash.shared_observation import (
    MASK_VALUE,
    additive,
    allowed,
    position_ids,
    shared_allowed,
    shared_position_ids,
)
from pronghorn.vlash.traces import replay_traces

# Absolute and relative; errors are given as shares of what these allow. Random weights amplify float32 noise.
LOSS = (1e-2, 5e-3)
SAMPLE = (3e-3, 0.0)
SEPARATE = (1e-3, 5e-4)  # ours against ours


def cases(folder: Path) -> list[Path]:
    """The golden files of a folder: all but what is written about them."""
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix != ".md")


def replay(path: Path, device: torch.device | str = "cpu") -> list[Check]:
    """Compare our results with one golden file.

    Args:
        path: the file; its kind is told by how its name starts.
        device: where our side runs.

    Raises:
        ValueError: a kind of file that is not known. It is never passed over.
    """
    for prefix, function in _KINDS.items():
        if path.name.startswith(prefix):
            return function(path, torch.device(device))
    raise ValueError(f"{path.name}: unknown kind of golden file; known are {', '.join(_KINDS)}")


def _replay_model(path: Path, device: torch.device) -> list[Check]:
    with safe_open(path, "pt") as file:
        about = file.metadata()
    golden = load_file(path, device=str(device))
    inputs = {name.removeprefix("in."): tensor for name, tensor in golden.items() if name.startswith("in.")}
    network = _network({name[2:]: tensor for name, tensor in golden.items() if name.startswith("w.")}, about)
    state_dtype = torch.bfloat16 if about["kind"] == PI0 else None
    with torch.no_grad():
        return _model_checks(pi_model(network, state_dtype=state_dtype), network, inputs, golden, int(about["steps"]))


def _network(weights: dict[str, Tensor], about: dict[str, str]) -> PiNetwork:
    language, expert = "vlm.model.language_model.", "action_expert.model."
    (vocab, prefix_width), (width, action_dim) = (
        weights[f"{language}embed_tokens.weight"].shape,
        weights["suffix_embedder.action_in_proj.weight"].shape,
    )
    state = weights.get("suffix_embedder.state_proj.weight")
    sizes = PiSizes(
        kind=about["kind"], depth=len({name for name in weights if name.startswith(expert) and "q_proj" in name}),
        heads=int(about["heads"]), kv_heads=int(about["kv_heads"]), head_dim=int(about["head_dim"]),
        prefix_width=prefix_width, prefix_mlp=len(weights[f"{language}layers.0.mlp.up_proj.weight"]),
        width=width, mlp=len(weights[f"{expert}layers.0.mlp.up_proj.weight"]), vocab=vocab,
        state_dim=width if state is None else state.shape[1], action_dim=action_dim,
        rope_theta=float(about["rope_theta"]), eps=float(about["eps"]),
    )  # fmt: skip
    network = PiNetwork(sizes, state_cond=about["state_cond"] == "True")
    network.load_state_dict(weights)
    return network.to(next(iter(weights.values())).device)


def _model_checks(
    model: PiModel, network: PiNetwork, inputs: dict[str, Tensor], golden: dict[str, Tensor], steps: int
) -> list[Check]:
    cameras = range(sum(name.startswith("image_emb.") for name in inputs))
    prefix = Prefix.join(
        [inputs[f"image_emb.{camera}"] for camera in cameras], [inputs[f"image_mask.{camera}"] for camera in cameras],
        network.embed_tokens(inputs["tokens"]), inputs["token_mask"],
    )  # fmt: skip
    losses = model.losses(prefix, inputs["state"], inputs["actions"], inputs["noise"], inputs["time"])
    sampled = model.sample(prefix, inputs["state"], inputs["noise"], steps)
    checks = [
        _near("loss", losses, golden["out.loss_elem"], LOSS),
        _near("sample", sampled, golden["out.sample"], SAMPLE),
    ]
    if "out.shared_loss_elem" not in golden:
        return checks
    mask = inputs["offset_mask"]
    states, actions, noise, time = (
        inputs[name] for name in ("states", "shared_actions", "shared_noise", "shared_time")
    )
    shared = model.shared_losses(prefix, states, actions, noise, time, mask)
    each = [
        model.losses(prefix, states[:, branch], actions[:, branch], noise[:, branch], time[:, branch])
        for branch in range(mask.shape[1])
    ]
    separate = torch.stack(each, dim=1)
    return [
        *checks,
        _near("shared loss", shared, golden["out.shared_loss_elem"], LOSS),
        _near("separate loss", separate, golden["out.separate_loss_elem"], LOSS),
        _near("shared and separate", shared[mask], separate[mask], SEPARATE),
    ]


def _replay_masks(path: Path, device: torch.device) -> list[Check]:
    golden = load_file(path, device=str(device))
    prefix, suffix = (golden["prefix_pad"], golden["prefix_att"]), (golden["suffix_pad"], golden["suffix_att"])
    offset_mask = golden["offset_mask"]
    joined = [torch.cat(pair, dim=1) for pair in zip(prefix, suffix, strict=True)]
    positions = shared_position_ids(prefix[0], suffix[0], offset_mask.shape[1])
    hidden = additive(torch.zeros(1, dtype=torch.bool, device=device))
    return [
        _same("allowed", allowed(*joined), golden["allowed"]),
        _same("position ids", position_ids(prefix[0], suffix[0]), golden["position_ids"]),
        _same("shared allowed", shared_allowed(*prefix, *suffix, offset_mask), golden["shared_allowed"]),
        _same("shared position ids", positions, golden["shared_position_ids"]),
        _same("mask value", torch.full_like(golden["mask_value"], MASK_VALUE), golden["mask_value"]),
        _same("what is added", hidden, golden["mask_value"]),
    ]


def _replay_small_functions(path: Path, device: torch.device) -> list[Check]:
    golden = load_file(path, device=str(device))
    checks = []
    for name, wanted in golden.items():
        if name in ("time", "state") or name.startswith("image"):
            continue
        if name.startswith("sincos_"):
            ours = sincos(golden["time"], int(name.removeprefix("sincos_")))
            checks.append(_near(name, ours, wanted, (1e-12 if device.type == "cpu" else 1e-9, 0.0)))
        elif name.startswith("resized_"):
            words = name.split("_")
            size = int(words[-1])
            image = golden["_".join(["image", *words[1:-1]])]
            checks.append(_near(name, to_model_range(resize_with_padding(image, size, size)), wanted, (1e-6, 0.0)))
        elif name == "state_bins":
            checks.append(_same(name, state_bins(golden["state"]), wanted))
        else:
            raise ValueError(f"{path.name}: unknown function {name}")
    return checks


def _replay_normalize(path: Path, device: torch.device) -> list[Check]:
    golden = load_file(path, device=str(device))
    statistics = {name.removeprefix("stat."): value for name, value in golden.items() if name.startswith("stat.")}
    checks = []
    for mode in STATISTICS:
        if mode != IDENTITY:
            there, wanted = normalize(golden["x"], statistics, mode), golden[f"norm.{mode}"]
            checks.append(_near(f"norm.{mode}", there, wanted, (1e-6, 1e-6)))
            checks.append(_near(f"unnorm.{mode}", unnormalize(wanted, statistics, mode), golden[f"unnorm.{mode}"],
                                (1e-6, 1e-6)))  # fmt: skip
    return checks


def _replay_traces(path: Path, device: torch.device) -> list[Check]:
    return replay_traces(path)


def _replay_offsets(path: Path, device: torch.device) -> list[Check]:
    checks = []
    for number, case in enumerate(json.loads(path.read_text())):
        rows = _ToyRows(case)
        rng = random.Random(case["python_random_seed"])  # noqa: S311  # their stream, not a secret
        items = [rows.item(item["idx"], draw_offset(case["max_delay_steps"], rng)) for item in case["random_items"]]
        checks.append(_equal(f"{number}: random items", items, case["random_items"]))
        windows = [rows.item(item["idx"], item["offset"], by_window=True) for item in case["random_items"]]
        checks.append(_equal(f"{number}: random items from windows", windows, case["random_items"]))
        batch = collate([rows.every_offset(index) for index in case["indices"]])
        ours = {
            "state0": batch.states[..., 0].tolist(), "action0": batch.actions[..., 0].tolist(),
            "is_pad": batch.is_pad.int().tolist(), "offset_mask": batch.offset_mask.int().tolist(),
            "max_offsets": batch.states.shape[1],
        }  # fmt: skip
        checks += [_equal(f"{number}: {name}", value, case["shared_batch"][name]) for name, value in ours.items()]
    return checks


class _ToyRows:
    """Episodes whose states are 1000 * episode + step, and actions half more."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case, self.episodes = case, [0]
        for length in case["episode_lengths"]:
            self.episodes.append(self.episodes[-1] + length)
        values = torch.cat([1000.0 * number + torch.arange(n) for number, n in enumerate(case["episode_lengths"])])
        self.states = values[:, None].expand(-1, case["state_dim"])
        self.actions = values[:, None].expand(-1, case["action_dim"]) + 0.5

    def item(self, index: int, offset: int, *, by_window: bool = False) -> dict[str, Any]:
        """As `random_items` list it; by the rows it reads, or cut out of a window of all delays."""
        begin, end = self._episode(index)
        if by_window:
            actions, is_pad, state, horizon, future = self._window(index)
            found = apply_offset(actions, is_pad, state, torch.tensor([offset]), horizon, future_states=future)
            actions, is_pad, state = (part[0] for part in found)
        else:
            columns, is_pad = offset_indices(index, offset, begin, end, self.case["chunk"])
            truth = self.case["use_state_ground_truth"]
            row = state_index(index, offset, begin, end, ground_truth=truth)
            actions, state = self.actions[columns], (self.states if truth or not offset else self.actions)[row]
        return {"idx": index, "offset": offset, "state0": float(state[0]), "action0": actions[:, 0].tolist(),
                "is_pad": is_pad.int().tolist()}  # fmt: skip

    def every_offset(self, index: int) -> OffsetSamples:
        """All delays of one sample."""
        actions, is_pad, state, horizon, future = self._window(index)
        return OffsetSamples(*(part[0] for part in all_offsets(actions, is_pad, state, horizon, future_states=future)))

    def _window(self, index: int) -> tuple[Tensor, Tensor, Tensor, int, Tensor | None]:
        begin, end = self._episode(index)
        chunk, most = self.case["chunk"], self.case["max_delay_steps"]
        columns, is_pad = offset_indices(index, 0, begin, end, chunk + most)
        future = self.states[offset_indices(index, 0, begin, end, most + 1)[0]][None]
        truth = future if self.case["use_state_ground_truth"] else None
        return self.actions[columns][None], is_pad[None], self.states[index][None], chunk, truth

    def _episode(self, index: int) -> tuple[int, int]:
        later = next(number for number, begin in enumerate(self.episodes) if begin > index)
        return self.episodes[later - 1], self.episodes[later]


def _replay_keys(path: Path, device: torch.device) -> list[Check]:
    lines = [line.split("\t") for line in path.read_text().splitlines() if line]
    shapes = {name: tuple(json.loads(shape)) for name, shape in lines}
    names = {name: vlash_name(name) for name in shapes}
    checks = [_equal("one name each", len(set(names.values())), len(shapes))]
    for prefixed in (True, False):
        wanted = {("model." if prefixed else "") + name: other for name, other in names.items()}
        checks.append(_equal(f"there, prefixed={prefixed}", {name: vlash_name(name) for name in wanted}, wanted))
        back = [lerobot_name(other, prefixed=prefixed) for other in wanted.values()]
        checks.append(_equal(f"and back, prefixed={prefixed}", back, list(wanted)))
    kind = PI0 if any(name.startswith("action_time_mlp_in") for name in shapes) else "pi05"
    with torch.device("meta"):
        network = PiNetwork(PiSizes(kind=kind))
    ours = {f"model.{name}": tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    by_name = {names[name]: shape for name, shape in shapes.items()}
    checks.append(_equal("shapes", ours, {name: by_name.get(name) for name in ours}))
    elsewhere = [name for name in by_name if name not in ours and not _is_elsewhere(name)]
    return [*checks, _equal("weights that no module has", elsewhere, [])]


def _is_elsewhere(name: str) -> bool:
    """What a network of ours leaves to LeRobot: seeing, and speaking."""
    return any(part in name for part in (".vision_tower.", ".multi_modal_projector.", ".lm_head."))


def _near(name: str, ours: Tensor, theirs: Tensor, allowed: tuple[float, float]) -> Check:
    """The largest error, as a share of what is allowed there: absolute + relative * their value."""
    if ours.shape != theirs.shape:
        return Check(f"{name}: {list(ours.shape)} for {list(theirs.shape)}", math.inf, 1.0)
    share = (ours.double() - theirs.double()).abs() / (allowed[0] + allowed[1] * theirs.double().abs())
    return Check(name, float(share.max()), 1.0)


def _same(name: str, ours: Tensor, theirs: Tensor) -> Check:
    return Check(name, 0.0 if torch.equal(ours, theirs) else math.inf, 0.0)


def _equal(name: str, ours: Any, theirs: Any) -> Check:
    return Check(name, 0.0 if ours == theirs else math.inf, 0.0)


_KINDS: dict[str, Callable[[Path, torch.device], list[Check]]] = {
    "model_": _replay_model,
    "masks_": _replay_masks,
    "small_functions": _replay_small_functions,
    "normalize": _replay_normalize,
    "async_manager_traces": _replay_traces,
    "dataset_offsets": _replay_offsets,
    "keys_": _replay_keys,
}
