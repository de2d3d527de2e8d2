"""Weights for a vLLM server through a folder that it can read: for devices without NCCL, such as CPUs."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
import torch
from safetensors.torch import save_file
from torch import Tensor
from trl.experimental.async_grpo.vllm_client import VLLMClient

from pronghorn.files.tensor_files import marked

_log = logging.getLogger(__name__)

EXTENSION = "pronghorn.vllm.weight_files.WeightFiles"
CONTROL_SECONDS = 300
SHARD_BYTES = 4 << 30
FORMAT = 2  # of the files


class FileWeightTransfer:
    """TRL's `WeightTransferProtocol` by files: a trainer's weights are saved, and the server's workers load them.

        VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs \\
            --worker-extension-cls pronghorn.vllm.weight_files.WeightFiles

        trainer = ...(MODEL, args=args, weight_transfer=FileWeightTransfer("http://127.0.0.1:8000", "/dev/shm/weights"))

    Requests that run while weights change are kept, and vLLM computes their keys and values anew. All parameters of a
    layer that learns must be sent; a layer that is frozen whole stays as it is.

    Args:
        server: its address.
        folder: where weights are written, which the server sees under the same path; room for two copies is needed.
        ready_seconds: that the server may take until it answers.
        load_seconds: that it may take to load weights.

    Raises:
        RuntimeError: the server does not take weights so, or could not load them.
        OSError: weights could not be written.
    """

    def __init__(
        self, server: str, folder: Path | str, *, ready_seconds: float = 240.0, load_seconds: float = 1800.0
    ) -> None:
        self._client, self._folder = VLLMClient(server, ready_seconds), Path(folder).resolve()
        self._load_seconds = load_seconds
        self._sent = 0
        self._dtype = ""

    def init_weight_transfer(self) -> None:
        """Wait for the server, and ask whether it takes weights."""
        self._client.wait_for_server_ready()
        try:
            self._dtype = self._client.get_dtype().removeprefix("torch.")
        except requests.HTTPError as error:
            raise RuntimeError(
                f"{self._client.server_url} tells nothing of itself; start it with VLLM_SERVER_DEV_MODE=1"
            ) from error

    def pause(self) -> None:
        """Hold requests, and forget keys and values of the weights so far."""
        self._client.pause(timeout=CONTROL_SECONDS)

    def send_weights(self, iterator: Iterator[tuple[str, Tensor]]) -> None:
        """Save weights, and have the server load them."""
        self._sent += 1
        path = self._folder / f"weights-{self._sent}"
        self._warn_of_precision(_save(iterator, path))
        body: dict[str, Any] = {"method": "load_weight_files", "kwargs": {"path": str(path)}}
        answer = requests.post(f"{self._client.server_url}/collective_rpc", json=body, timeout=self._load_seconds)
        if answer.status_code != requests.codes.ok:
            raise RuntimeError(
                f"{self._client.server_url} loaded no weights from {path}; it is to see that folder, and to run with "
                f"--worker-extension-cls {EXTENSION}: {answer.text[:500]}"
            )
        for older in self._folder.glob("weights-*"):
            if older != path:
                shutil.rmtree(older)

    def resume(self) -> None:
        """Let requests go on."""
        self._client.resume(timeout=CONTROL_SECONDS)

    def destroy(self) -> None:
        """Remove the last weights."""
        shutil.rmtree(self._folder / f"weights-{self._sent}", ignore_errors=True)

    def _warn_of_precision(self, dtypes: set[torch.dtype]) -> None:
        names = {str(dtype).removeprefix("torch.") for dtype in dtypes}
        if self._sent == 1 and names != {self._dtype}:
            _log.warning(
                "weights are %s, the server computes in %s: log-probabilities differ where nothing else does",
                ", ".join(sorted(names)), self._dtype,
            )  # fmt: skip


def _save(weights: Iterator[tuple[str, Tensor]], path: Path) -> set[torch.dtype]:
    """Write a folder of safetensors, which is there when it is whole; return the kinds of numbers."""
    unfinished = path.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(path, ignore_errors=True)  # of an earlier run
    unfinished.mkdir(parents=True)
    shard: dict[str, Tensor] = {}
    size, number, dtypes = 0, 0, set()
    for name, weight in weights:
        shard[name] = weight.detach().contiguous().cpu()
        size += weight.nbytes
        dtypes.add(weight.dtype)
        if size >= SHARD_BYTES:
            _save_shard(shard, unfinished, number)
            shard, size, number = {}, 0, number + 1
    if shard:
        _save_shard(shard, unfinished, number)
    unfinished.rename(path)
    return dtypes


def _save_shard(shard: dict[str, Tensor], folder: Path, number: int) -> None:
    save_file(shard, folder / f"model-{number:05}.safetensors", metadata=marked(shard, format=FORMAT))
