"""Recognise calls that may skip torch's dispatcher and go straight to an op's backend."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def is_plain(values: Iterable[object]) -> bool:
    """True for ordinary eager tensors: no compile or export trace, no subclass, no functorch level, no dispatch mode.

    A value that is not a tensor passes: the op's own checks refuse it by name. Every eager call runs this, so it is a
    loop: a generator expression takes twice the time.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    for value in values:
        kind = type(value)
        if kind is not Tensor and value is not None and kind is not torch.nn.Parameter and isinstance(value, Tensor):
            return False
    return True
