"""Register the benchmark cases that `make bench` and `gpu_check` measure."""

from __future__ import annotations

from collections.abc import Sequence

from .case import SIZES, Case
from .ops import advantages, ensemble_reward, linear_logprob, preference_step

CASES: tuple[Case, ...] = (
    *ensemble_reward.cases(),
    *preference_step.cases(),
    *linear_logprob.cases(),
    *advantages.cases(),
)


def ops() -> list[str]:
    """Names of the ops with cases, in the table's order."""
    return list(dict.fromkeys(case.op for case in CASES))


def default_size(device: str) -> str:
    return "full" if device == "cuda" else "small"


def select(device: str, size: str | None = None, names: Sequence[str] = ()) -> list[Case]:
    """The cases of the ops `names` (none: all ops) for a device type. Size full includes the shapes of small; None is
    full on a GPU and small elsewhere. Raises ValueError for an unknown size or op.
    """
    size = size or default_size(device)
    if size not in SIZES:
        raise ValueError(f"bench: size: expected one of {', '.join(SIZES)}, got {size!r}")
    for name in names:
        if name not in ops():
            raise ValueError(f"bench: op: expected one of {', '.join(ops())}, got {name!r}")
    sizes = ("small", "full") if size == "full" else (size,)
    chosen = [case for case in CASES if case.size in sizes and device in case.devices]
    return [case for case in chosen if not names or case.op in names]
