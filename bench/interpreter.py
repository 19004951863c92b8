"""Let Triton's interpreter run with the newest numpy; the tests and bench/traffic.py call `accept_new_numpy`."""

from __future__ import annotations

from typing import Any


def accept_new_numpy() -> None:
    """Give the interpreter of Triton 3.5 and 3.6 the `__index__` of later ones.

    A scalar is an array of shape [1] there, and `range(scalar)` calls int() of it, which numpy 2.4 refuses.
    """
    from triton.runtime import interpreter

    module: Any = interpreter
    patch = module._patch_lang_tensor
    if hasattr(patch, "accepts_new_numpy"):
        return

    def patch_and_index(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        assign = scope[0].set_attr if scope else setattr  # 3.5 has no scope to restore
        assign(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    patch_and_index.accepts_new_numpy = True  # type: ignore[attr-defined]
    module._patch_lang_tensor = patch_and_index
