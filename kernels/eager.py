"""Which calls may skip the dispatcher: every op's plain eager road asks here."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def is_plain(tensors: Iterable[object]) -> bool:
    """True for ordinary eager tensors: no compile or export trace, no subclass, no functorch level, no dispatch mode.

    What is no tensor at all passes here: the op's own checks refuse it by name.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors if isinstance(t, Tensor))
