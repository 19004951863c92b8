"""Count the bytes that Triton kernels read and write, per argument, under Triton's interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .interpreter import accept_new_numpy

# method of the interpreter's builder -> (index of the pointers, index of the mask, whether it reads, whether it writes)
_COUNTED: dict[str, tuple[int, int | None, bool, bool]] = {
    "create_masked_load": (0, 1, True, False),
    "create_masked_store": (0, 2, False, True),
    "create_atomic_rmw": (1, 3, True, True),
    "create_atomic_cas": (0, None, True, True),
}


@dataclass
class Access:
    """Bytes that one launch read from and wrote to one argument: all bytes, and distinct bytes."""

    kernel: str
    tensor: str
    shape: tuple[int, ...]
    read: int = 0
    distinct_read: int = 0
    written: int = 0
    distinct_written: int = 0


class _Region:
    """The memory of one argument, and which of its elements a launch has touched."""

    def __init__(self, kernel: str, name: str, value: torch.Tensor):
        self.access, self.itemsize = Access(kernel, name, tuple(value.shape)), value.element_size()
        span = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        self.start, self.end = value.data_ptr(), value.data_ptr() + span * self.itemsize
        self.reads, self.writes = np.zeros(span, bool), np.zeros(span, bool)

    def count(self, addresses: Any, reads: bool, writes: bool) -> None:
        elements = (addresses - self.start) // self.itemsize
        if reads:
            self.reads[elements] = True
            self.access.read += elements.size * self.itemsize
        if writes:
            self.writes[elements] = True
            self.access.written += elements.size * self.itemsize

    def close(self) -> Access:
        self.access.distinct_read = int(self.reads.sum()) * self.itemsize
        self.access.distinct_written = int(self.writes.sum()) * self.itemsize
        return self.access


@contextlib.contextmanager
def counting() -> Iterator[list[Access]]:
    """Inside the block, count every interpreted launch: append one Access for each of its tensors to the list."""
    from triton.runtime import interpreter

    accept_new_numpy()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    missing = [name for name in _COUNTED if not hasattr(builder, name)]
    if missing:
        raise ImportError(f"bench --traffic: the interpreter of this triton lacks {', '.join(missing)}")
    found: list[Access] = []
    regions: list[_Region] = []
    originals = {name: getattr(builder, name) for name in _COUNTED}
    run = executor.__call__

    def wrapped(name: str) -> Any:
        pointers, mask, reads, writes = _COUNTED[name]

        def counted(self: Any, *arguments: Any, **named: Any) -> Any:
            addresses = np.asarray(arguments[pointers].data)
            wanted = np.ones(addresses.shape, bool) if mask is None else np.asarray(arguments[mask].data).astype(bool)
            left = np.broadcast_to(addresses, wanted.shape)[wanted].astype(np.int64)
            for region in regions:
                inside = (left >= region.start) & (left < region.end)
                if inside.any():
                    region.count(left[inside], reads, writes)
                    left = left[~inside]
            if left.size:
                raise RuntimeError(f"bench --traffic: {name}: {left.size} addresses outside every argument")
            return originals[name](self, *arguments, **named)

        return counted

    def launched(self: Any, *arguments: Any, **named: Any) -> None:
        values = {**dict(zip(self.arg_names, arguments, strict=False)), **named}
        tensors = {k: v for k, v in values.items() if k in self.arg_names and isinstance(v, torch.Tensor) and v.numel()}
        kernel = str(self.fn.__name__).removesuffix("_kernel")
        regions[:] = [_Region(kernel, name, value) for name, value in tensors.items()]
        run(self, *arguments, **named)
        found.extend(region.close() for region in regions)

    try:
        for name in _COUNTED:
            setattr(builder, name, wrapped(name))
        executor.__call__ = launched
        yield found
    finally:
        for name, original in originals.items():
            setattr(builder, name, original)
        executor.__call__ = run


@dataclass
class Report:
    """The accesses of one call of an op. A tensor is per-row if one of its sizes is in `rows` (rows of the call, rows
    stored).

    floor: bytes per row if each per-row input is read once and each per-row output is written once.
    """

    op: str
    mode: str
    rows: tuple[int, ...]
    floor: float
    accesses: list[Access]

    def has_rows(self, access: Access) -> bool:
        return any(size in self.rows for size in access.shape)

    def asked(self) -> float:
        """Bytes per row that the kernels read and write, in all per-row tensors, scratch included."""
        return sum(a.read + a.written for a in self.accesses if self.has_rows(a)) / self.rows[0]

    def distinct(self) -> float:
        """The same without repeats inside a launch: the traffic if repeats hit the cache."""
        return sum(a.distinct_read + a.distinct_written for a in self.accesses if self.has_rows(a)) / self.rows[0]

    def of(self, tensor: str) -> list[Access]:
        """All launches' accesses to one argument."""
        return [access for access in self.accesses if access.tensor == tensor]
