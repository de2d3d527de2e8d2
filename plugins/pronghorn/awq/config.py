"""Every knob of AWQ, its default and where it comes from."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pronghorn.configuration import from_values

METHOD = "pronghorn_awq"
PUBLISHED_METHOD = "awq"
BITS = (2, 3, 4, 8)
# Checkpoint formats and the memory layout of `pronghorn.kernels.dequantize_weight` that each is made of.
LAYOUT_OF_VERSION = {
    "gemm": "gemm",
    "gemv": "gemv",
    "gemv_fast": "gemv_fast",
    "llm-awq": "gemv_fast",
    "exllama": "exllama",
    "marlin": "marlin",
    "natural": "natural",
}
ALIASES = {"w_bit": "bits", "q_group_size": "group_size", "format": "version", "checkpoint_format": "version"}
NOT_SERIALIZED = ("calibration", "search_result", "state_dir")


@dataclasses.dataclass
class AwqConfig:
    """Configuration of AWQ; give it to `from_pretrained(quantization_config=…)`.

    Attributes:
        bits: width of a code: 4 (the paper's), 3, 2 or 8.
        group_size: input channels that share a scale; it must divide every linear's, -1 takes whole rows (paper: 128).
        zero_point: asymmetric grid with a zero point; False is symmetric.
        version: checkpoint format: "gemm" (AutoAWQ's, what most of the hub uses and vLLM reads), "gemv" (llm-awq v1),
            "gemv_fast" and "llm-awq" (TinyChat v2), "exllama", "marlin" (symmetric), all 4 bits; "natural" (any bits).
        modules_to_not_convert: linears whose name has one of these among its components ("down_proj", "layers.0",
            "model.visual") stay in 16 bits.
        method: "awq" searches scales and clipping, "rtn" only rounds to nearest.
        duo_scaling: AutoAWQ's rule, which divides by the weights' magnitude; False is the paper's.
        clip: search clipping too.
        grid: points of the search over the scales' exponent (paper: 20).
        scale_groups: which module feeds which linears, instead of tracing it: a list of
            {"prev": name, "linears": [names], "inspect": name}, names inside a decoder block.
        calibration: texts, token ids, a callable that returns either, or "builtin" for text that Python comes with.
        n_samples: at most so many calibration sequences (paper: 128).
        seq_len: tokens of each (paper: 512).
        search_result: file of a saved search, instead of searching.
        state_dir: where a search keeps its progress, so that it can be resumed.
    """

    bits: int = 4
    group_size: int = 128
    zero_point: bool = True
    version: str = "gemm"
    modules_to_not_convert: list[str] | None = None
    method: str = "awq"
    duo_scaling: bool = False
    clip: bool = True
    grid: int = 20
    scale_groups: list[dict[str, Any]] | None = None
    calibration: Any = "builtin"
    n_samples: int = 128
    seq_len: int = 512
    search_result: str | None = None
    state_dir: str | None = None

    quant_method: ClassVar[str] = METHOD

    def __post_init__(self) -> None:
        self.version = self.version.lower() if isinstance(self.version, str) else self.version
        _check_choice("bits", self.bits, BITS)
        _check_choice("version", self.version, tuple(LAYOUT_OF_VERSION))
        _check_choice("method", self.method, ("awq", "rtn"))
        if not _is_int(self.group_size) or (self.group_size < 1 and self.group_size != -1):
            raise ValueError(f"group_size: got {self.group_size!r}, accepted are -1 and positive integers")
        for name in ("zero_point", "duo_scaling", "clip"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, wanted True or False")
        for name in ("grid", "n_samples", "seq_len"):
            if not _is_int(getattr(self, name)) or getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted a positive integer")
        if self.bits != 4 and self.version != "natural":
            raise ValueError(
                f"version: {self.version!r} holds 4 bits only, got bits={self.bits}; use version='natural'"
            )
        if self.version == "marlin" and self.zero_point:
            raise ValueError("version: 'marlin' is symmetric; use zero_point=False")
        for name in ("search_result", "state_dir"):
            if not isinstance(getattr(self, name), (str, os.PathLike, type(None))):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, wanted a path or None")
        _check_names("modules_to_not_convert", self.modules_to_not_convert)
        _check_scale_groups(self.scale_groups)

    @property
    def layout(self) -> str:
        """Memory layout of the packed weights."""
        return LAYOUT_OF_VERSION[self.version]

    def check_in_features(self, in_features: int, name: str) -> int:
        """The group size for a linear of so many inputs; ValueError if it does not divide them."""
        size = in_features if self.group_size == -1 else self.group_size
        if in_features % size:
            raise ValueError(
                f"group_size: {size} does not divide the {in_features} input channels of {name}; "
                f"take a divisor, or put {name.rsplit('.', 1)[-1]!r} into modules_to_not_convert"
            )
        return size

    def to_dict(self) -> dict[str, Any]:
        """JSON for `config.json`; 4-bit published formats come out as AutoAWQ writes them (`quant_method: awq`)."""
        fields = {
            f.name: copy.deepcopy(getattr(self, f.name))
            for f in dataclasses.fields(self)
            if f.name not in NOT_SERIALIZED
        }
        published = self.version != "natural"
        return {"quant_method": PUBLISHED_METHOD if published else METHOD, **fields}

    def to_diff_dict(self) -> dict[str, Any]:
        """`to_dict`, by the name that transformers asks for."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        """`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a user's configuration may change about a checkpoint's when loading: nothing."""
        return {}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read our own or a published configuration, `quant_config.json` of older AutoAWQ included.

        Raises:
            ValueError: `quant_method` is of another method, or ours with settings that are not ours.
        """
        if not isinstance(config_dict, Mapping):
            raise TypeError(f"quantization_config: got {type(config_dict).__name__}, wanted an object")
        given = {ALIASES.get(key, key): value for key, value in {**config_dict, **kwargs}.items()}
        method = given.pop("quant_method", METHOD)
        if method not in (METHOD, PUBLISHED_METHOD):
            got = repr(method) if isinstance(method, str) else type(method).__name__
            raise ValueError(f"quant_method: got {got}, accepted are {METHOD!r} and {PUBLISHED_METHOD!r}")
        if given.get("backend") == "llm-awq":
            given["version"] = "llm-awq"  # its converter writes "gemv" there, and means v2
        if "version" not in given and given.get("bits", 4) != 4:
            given["version"] = "natural"
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted({ALIASES.get(key, key) for key in config_dict} - known - {"quant_method"})
        if unknown and config_dict.get("quant_method") == METHOD:  # others' have settings of their own
            raise ValueError(f"{', '.join(map(repr, unknown))}: no setting of {METHOD}; a newer Pronghorn may know it")
        config = from_values(cls, {key: value for key, value in given.items() if key in known})
        unused = {key: value for key, value in kwargs.items() if ALIASES.get(key, key) not in known}
        return (config, unused) if return_unused_kwargs else config


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_choice(name: str, value: Any, accepted: Sequence[Any]) -> None:
    if type(value) is not type(accepted[0]) or value not in accepted:
        raise ValueError(f"{name}: got {value!r}, accepted are {', '.join(map(str, accepted))}")


def _check_names(name: str, value: Any) -> None:
    if value is not None and not (isinstance(value, list) and all(isinstance(entry, str) and entry for entry in value)):
        raise TypeError(f"{name}: got {value!r}, wanted a list of names or None")


def _check_scale_groups(groups: Any) -> None:
    if groups is None:
        return
    for group in groups if isinstance(groups, list) else [groups]:
        if (
            not isinstance(groups, list)
            or not isinstance(group, dict)
            or not {"prev", "linears"} <= group.keys() <= {"prev", "linears", "inspect"}
        ):
            raise ValueError(f"scale_groups: got {group!r}, wanted dicts with 'prev', 'linears' and maybe 'inspect'")
        _check_names("scale_groups: linears", group["linears"])
        _check_names("scale_groups: prev, inspect", [group["prev"], group.get("inspect") or "block"])
