"""Run a call with a process group outside torch.compile.

Imported at the first such call, because torch.compiler.disable imports the compiler, which takes more than a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


@torch.compiler.disable(reason="linear_logprob: a process group is not supported under torch.compile; call it outside")  # type: ignore[untyped-decorator]
def outside_compile(function: Callable[..., T], *arguments: object) -> T:
    """Call the function, with a break of the graph if torch.compile traces the caller."""
    return function(*arguments)
