"""Two processes of a group."""

import os
import socket
from collections.abc import Callable
from typing import Any, NoReturn

import torch


def on_two_ranks(work: Callable[..., object], *arguments: Any) -> None:
    """Run `work(rank, port, *arguments)` in two processes, which may meet at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, *arguments), nprocs=2)


def meet(rank: int, port: int) -> None:
    """Make the two processes' group."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)


def leave_together() -> NoReturn:
    """End a process of a group when all have come here.

    Now and then torch 2.13 ends a group by waiting for a thread that waits for the lock of the interpreter.
    """
    torch.distributed.barrier()
    os._exit(0)
