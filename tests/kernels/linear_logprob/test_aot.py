"""A property of the machine code beyond the budgets that ../test_triton_aot.py checks for every op."""

from __future__ import annotations

import re

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from prudent.bench import aot  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="under the interpreter nothing is compiled")


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_the_derivative_is_stored_over_its_tile_only_after_every_thread_has_read(target: str) -> None:
    """The tile's loads, then the program's barrier, then the stores, because both use the same memory."""
    entry = next(
        e for e in aot.entries("linear_logprob", target, False) if e.launch.kernel.__name__ == "gradient_kernel"
    )
    ptx = aot.compile_launch(entry.launch, target).asm["ptx"]
    places = {name: [m.start() for m in re.finditer(name, ptx)] for name in ("ld.global", "bar.sync", "st.global")}
    assert max(places["ld.global"]) < places["bar.sync"][-1] < min(places["st.global"])
