"""Whether a policy's checkpoint loads in LeRobot whole, and acts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies import get_policy_class, make_pre_post_processors
from torch import Tensor

from pronghorn.checkpoint import Checkpoint, Finding, failed, ok
from pronghorn.checkpoint.files import read_json
from pronghorn.checkpoint.source import AS_SOURCE, read_as_source, source_folder

LIBRARIES = ("lerobot", "pronghorn")
CALLS = 3
TASK = "pick up the cube"


def check(
    checkpoint: Checkpoint,
    source: str | None,
    min_agreement: float,
    after_loading: Callable[[Any], Iterable[Finding]],
) -> Iterator[Finding]:
    """Load the policy with its processors, let it act, and compare the actions with its source's."""
    base = None if source is None else source_folder(source)
    foreign = _foreign(checkpoint.folder)
    if foreign:
        yield failed("processors", f"{foreign}: wanted steps of {', '.join(LIBRARIES)}, or registered ones",
                     "remove the step: loading the policy would import that module")  # fmt: skip
        return
    policy, before, after = load_whole(checkpoint.folder)
    yield ok("policy", f"{policy.config.type}, {sum(p.numel() for p in policy.parameters())} parameters")
    yield from after_loading(policy)
    actions = act(policy, before, after)
    wanted = tuple(policy.config.action_feature.shape)
    if tuple(actions.shape[2:]) != wanted:
        yield failed("acts", f"actions of shape {tuple(actions.shape[2:])}, the configuration says {wanted}",
                     "save the policy again from the run that trained it")  # fmt: skip
        return
    if not bool(actions.isfinite().all()):
        yield failed("acts", "an action holds NaN or Inf", "look at the statistics that processors normalise with")
        return
    yield ok(
        "acts", f"{CALLS} finite actions of {wanted}, from {float(actions.min()):.2f} to {float(actions.max()):.2f}"
    )
    if base is not None:
        with read_as_source(base):
            if _foreign(base):
                raise ValueError(f"{_foreign(base)} would be imported")
            theirs = act(*load_whole(base))
        error = float((actions - theirs).norm() / theirs.norm().clamp_min(1e-30))
        detail = f"relative error {error:.6f} of the actions"
        passed = 1 - error >= min_agreement
        yield (
            ok(AS_SOURCE, detail)
            if passed
            else failed(AS_SOURCE, f"{detail}; wanted at most {1 - min_agreement:g}", "is this another source?")
        )


def load_whole(folder: Path) -> tuple[Any, Any, Any]:
    """Policy in evaluation mode, what prepares observations for it, and what its actions go through.

    Raises:
        Whatever LeRobot raises of a configuration, weights or processors that do not fit; keys are loaded strictly.
    """
    config = PreTrainedConfig.from_pretrained(str(folder))
    config.device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = get_policy_class(config.type).from_pretrained(str(folder), config=config, strict=True)
    overrides = {"device_processor": {"device": config.device}}
    before, after = make_pre_post_processors(config, pretrained_path=str(folder), preprocessor_overrides=overrides)
    return policy.to(config.device).eval(), before, after


@torch.no_grad()
def act(policy: Any, before: Any, after: Any) -> Tensor:
    """Actions [calls, 1, coordinates] for random observations of a fixed seed, as a robot would ask for them."""
    torch.manual_seed(0)
    policy.reset()
    found = []
    for _ in range(CALLS):
        seen = {name: torch.rand(1, *feature.shape) for name, feature in policy.config.input_features.items()}
        found.append(after(policy.select_action(before({**seen, "task": [TASK]}))).float().cpu())
    return torch.stack(found)


def _foreign(folder: Path) -> str:
    """The first step of a processor that is named by a path to import which is not LeRobot's or ours."""
    for path in sorted(folder.rglob("*processor*.json")):
        content = read_json(path)
        for step in content.get("steps", []) if isinstance(content, dict) else []:
            named = step.get("class") if isinstance(step, dict) else None
            if isinstance(named, str) and named.split(".")[0] not in LIBRARIES:
                return f"{path.name}: {named}"
    return ""
