"""The states of a LeRobot data set, without its images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet
import torch
from lerobot.utils.constants import OBS_STATE
from torch import Tensor


class RecordedStates:
    """Looks up what was measured some steps after a sample.

    LeRobot reads later states of a sample only together with the later images, which costs their decoding; the states
    alone fit into memory.

    Args:
        meta: the data set's metadata.

    Raises:
        FileNotFoundError: its files are not there, as of one that is streamed.
    """

    def __init__(self, meta: Any) -> None:
        files = sorted({Path(meta.root) / meta.get_data_file_path(episode) for episode in range(meta.total_episodes)})
        tables = [pyarrow.parquet.read_table(file, columns=["index", OBS_STATE]) for file in files]
        index = torch.cat([torch.tensor(table["index"].to_numpy()) for table in tables])
        states = torch.cat([_matrix(table[OBS_STATE]) for table in tables])
        self._states = torch.empty_like(states)
        self._states[index] = states
        self._ends = torch.tensor(meta.episodes["dataset_to_index"])

    def after(self, index: Tensor, delays: int) -> Tensor:
        """The states 0, 1, ... steps after samples, the last one of the episode repeated.

        Args:
            index: int64 [batch], of the samples in the data set.
            delays: how many states of each.

        Returns:
            float32 [batch, delays, state_dim], on the CPU.
        """
        index = index.cpu().flatten()
        last = self._ends[torch.bucketize(index, self._ends, right=True)] - 1
        return self._states[torch.minimum(index[:, None] + torch.arange(delays), last[:, None])]


def _matrix(column: pyarrow.ChunkedArray) -> Tensor:
    """float32 [rows, state_dim], of a column of lists."""
    numbers = pyarrow.compute.list_flatten(column).to_numpy()
    return torch.tensor(numbers, dtype=torch.float32).view(len(column), -1)
