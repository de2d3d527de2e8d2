"""Registers an operation where the host's time counts: without the layers that `torch.library.custom_op` adds."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

PLAIN = (torch.Tensor, torch.nn.Parameter)


def define(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function one operation, `torch.ops.pronghorn.<name>`, on every device.

    What is returned calls the operation where something is there to see it, as a compiler or a fake tensor, and else
    the function itself: the dispatcher takes longer than some of them.

    Gradients are added by a `torch.autograd.Function` around it, which costs a tenth of what registering them does:
    launching a small kernel takes less time than that.

    Args:
        name: of the operation.
        function: what it does; its type hints are its schema, and it changes no argument. Its first argument is a
            tensor, or a list of some.
        fake: the same for tensors without data.
    """
    qualified = f"pronghorn::{name}"
    schema = torch.library.infer_schema(inspect.unwrap(function), mutates_args=())
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "default", function)
    torch.library.register_fake(qualified, fake)
    operation = getattr(torch.ops.pronghorn, name)

    def call(*arguments: Any) -> Any:
        first = arguments[0][0] if type(arguments[0]) is list else arguments[0]
        seen = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or type(first) not in PLAIN
        return operation(*arguments) if seen else function(*arguments)

    return call
