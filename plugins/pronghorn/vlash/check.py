"""What only VLASH can say of a checkpoint before it is shipped: its settings, and chunks for late observations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from pronghorn.checkpoint import Checkpoint, Finding, failed, ok
from pronghorn.vlash.config import VLASHSettings

TYPE = "vlash"
PROCESSORS = "base"
TASK = "pick up the cube"


def check_files(checkpoint: Checkpoint) -> Iterator[Finding]:
    """The settings of a policy of type `vlash`, and its wrapped policy's processors; nothing for others."""
    config = checkpoint.config
    if config.get("type") != TYPE:
        return
    known = {item.name for item in fields(VLASHSettings)}
    try:
        found = VLASHSettings.from_dict({name: value for name, value in config.items() if name in known})
    except (ValueError, TypeError) as error:
        yield failed("VLASH settings", str(error), "mend config.json, or train with other settings")
        return
    if not (checkpoint.folder / PROCESSORS).is_dir():
        yield failed("VLASH processors", f"there is no folder {PROCESSORS}", "save the policy again as a whole")
        return
    overlap = found.inference_overlap_steps
    yield ok("VLASH settings", f"{found.n_action_steps} of {found.chunk_size} actions, overlap {overlap}")


def check_loaded(checkpoint: Checkpoint, policy: Any) -> Iterator[Finding]:
    """That a chunk has the size that the settings say, and numbers in it."""
    if checkpoint.config.get("type") != TYPE:
        return
    import torch

    torch.manual_seed(0)
    seen = {name: torch.rand(1, *feature.shape) for name, feature in policy.config.input_features.items()}
    seen = {name: value.to(policy.config.device) for name, value in seen.items()}
    policy.reset()
    with torch.no_grad():
        chunk = policy.predict_action_chunk({**seen, "task": [TASK]})
    policy.reset()
    wanted = (1, policy.config.chunk_size, *policy.config.action_feature.shape)
    if tuple(chunk.shape) != wanted or not bool(chunk.isfinite().all()):
        yield failed(
            "VLASH chunk", f"{tuple(chunk.shape)}, wanted {wanted} of finite numbers", "train or save it again"
        )
        return
    yield ok("VLASH chunk", f"{tuple(chunk.shape[1:])}, finite")
