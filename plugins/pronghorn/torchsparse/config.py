"""How a sparse convolution is computed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pronghorn.configuration import from_values

IMPLICIT_GEMM, GATHER_SCATTER, FETCH_ON_DEMAND = "implicit_gemm", "gather_scatter", "fetch_on_demand"
DATAFLOWS = (IMPLICIT_GEMM, GATHER_SCATTER, FETCH_ON_DEMAND)
KMAP_MODES = ("hashmap_on_the_fly", "hashmap", "grid")
DOWNSAMPLE_MODES = ("spconv", "minkowski")


@dataclass(frozen=True)
class ConvConfig:
    """One layer's way to compute; layers that share a kernel map should share it. All ways give the same result.

    Attributes:
        dataflow: "implicit_gemm" gathers the rows of each output while it multiplies; "gather_scatter" gathers all
            rows, multiplies offset by offset, and scatters; "fetch_on_demand" multiplies pair by pair and adds
            atomically, in any order.
        ifsort: implicit gemm sorts outputs by the neighbours that they have, and passes over those that a tile lacks.
        kmap_mode: "hashmap_on_the_fly" pads as dense convolution does; "hashmap" centres every kernel, as older
            versions did; "grid" is the first with a table of every place instead of a hash table.
        downsample_mode: "spconv" keeps every site that a kernel reaches; "minkowski" those that inputs fall into.
        split_mask_num: parts of the offsets that are sorted by themselves.
        split_mask_num_bwd: the same for the gradient of the input.
        epsilon: gather_scatter multiplies offsets together whose sizes differ by less than this share.
        mm_thresh: it does so with groups whose largest size is below this number of rows.

    Raises:
        ValueError, TypeError: a value is not one of those.

    Source: Tang et al., TorchSparse++ (MICRO 2023), sections 3 and 4; the defaults are those of its library.
    """

    dataflow: str = IMPLICIT_GEMM
    ifsort: bool = False
    kmap_mode: str = "hashmap_on_the_fly"
    downsample_mode: str = "spconv"
    split_mask_num: int = 1
    split_mask_num_bwd: int = 3
    epsilon: float = 0.0
    mm_thresh: int = 0

    def __post_init__(self) -> None:
        for name, accepted in (
            ("dataflow", DATAFLOWS), ("kmap_mode", KMAP_MODES), ("downsample_mode", DOWNSAMPLE_MODES)
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in accepted:
                raise ValueError(f"{name}: got {value!r}, accepted are {', '.join(accepted)}")
        if not isinstance(self.ifsort, bool):
            raise TypeError(f"ifsort: got {self.ifsort!r}, wanted True or False")
        for name, least in (("split_mask_num", 1), ("split_mask_num_bwd", 1), ("mm_thresh", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}: got {value!r}, wanted a whole number of at least {least}")
        if not isinstance(self.epsilon, int | float) or not 0 <= self.epsilon <= 1:
            raise ValueError(f"epsilon: got {self.epsilon!r}, wanted a number from 0 to 1")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ConvConfig:
        """From what `to_dict` gave.

        Raises:
            ValueError, TypeError: there are other names, or values that are none.
        """
        return from_values(cls, values)
