"""What processes of a group share."""

import os
from typing import NoReturn

import torch


def leave_together() -> NoReturn:
    """End a process of a group when all have come here.

    Now and then torch 2.13 ends a group by waiting for a thread that waits for the lock of the interpreter.
    """
    torch.distributed.barrier()
    os._exit(0)
