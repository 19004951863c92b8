"""Split a registered op's flat argument list into NamedTuples, in the order of its schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, overload

_A = TypeVar("_A")
_B = TypeVar("_B")
_C = TypeVar("_C")
_D = TypeVar("_D")
_E = TypeVar("_E")


@overload
def split(arguments: Sequence[Any], a: type[_A], b: type[_B], c: type[_C], d: type[_D], /) -> tuple[_A, _B, _C, _D]: ...
@overload
def split(
    arguments: Sequence[Any], a: type[_A], b: type[_B], c: type[_C], d: type[_D], e: type[_E], /
) -> tuple[_A, _B, _C, _D, _E]: ...
def split(arguments: Sequence[Any], *parts: Any) -> tuple[Any, ...]:
    """One value for each of `parts`: a NamedTuple takes one argument for each of its fields, any other type one."""
    found, start = [], 0
    for part in parts:
        fields = getattr(part, "_fields", None)
        end = start + (1 if fields is None else len(fields))
        found.append(arguments[start] if fields is None else part(*arguments[start:end]))
        start = end
    assert start == len(arguments), f"expected {start} arguments, got {len(arguments)}"
    return tuple(found)
