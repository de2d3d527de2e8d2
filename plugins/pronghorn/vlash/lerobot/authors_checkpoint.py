"""Checkpoints of the authors' own code: LeRobot's pi0 and pi0.5 with other options, and without processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import draccus
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from lerobot.configs import PreTrainedConfig
from lerobot.utils.constants import POLICY_PREPROCESSOR_DEFAULT_NAME
from torch import Tensor

from pronghorn.files.json_files import parse_json
from pronghorn.files.tensor_files import opened
from pronghorn.vlash.pi.keys import NORMALIZERS, is_authors, normalization_statistics

CONFIG, WEIGHTS, PROCESSOR = "config.json", "model.safetensors", f"{POLICY_PREPROCESSOR_DEFAULT_NAME}.json"
# Options that LeRobot's policies do not have: of how it is computed, sizes that never change, and the state's way in.
OWN = ("fuse_qkv", "fuse_gate_up", "fuse_adarms", "vlm_config", "action_expert_config", "state_cond")


def base_file(path: str | Path, name: str) -> Path | None:
    """A file of a checkpoint, in a folder or a repository of the Hub; None where the checkpoint has no such file."""
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(str(path), name))
    except LocalEntryNotFoundError:
        raise  # the Hub was not asked
    except EntryNotFoundError:
        return None


def base_configuration(path: str) -> tuple[PreTrainedConfig, bool]:
    """The configuration of a checkpoint, LeRobot's or the authors', and whether it says `state_cond`.

    Raises:
        FileNotFoundError, ValueError: LeRobot does not know it.
    """
    file = base_file(path, CONFIG)
    content = {} if file is None else parse_json(file.read_bytes(), file)
    if not isinstance(content, dict) or not set(content) & set(OWN):
        return PreTrainedConfig.from_pretrained(path), False
    values = {name: value for name, value in content.items() if name not in (*OWN, draccus.CHOICE_TYPE_KEY)}
    kind = PreTrainedConfig.get_choice_class(content[draccus.CHOICE_TYPE_KEY])
    return draccus.decode(kind, values), bool(content.get("state_cond"))


def own_statistics(path: str | Path) -> dict[str, dict[str, Tensor]] | None:
    """The statistics that the authors' code keeps among the weights, where a checkpoint has no processors.

    Raises:
        ValueError: they are not finite.
    """
    if base_file(path, PROCESSOR) is not None:
        return None
    file = base_file(path, WEIGHTS)
    if file is None:
        return None
    with opened(file) as weights:
        names: list[str] = list(weights.keys())
        held: dict[str, Any] = {name: weights.get_tensor(name) for name in names if name.startswith(NORMALIZERS)}
    return normalization_statistics(held) if is_authors(names) else None
