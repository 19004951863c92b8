"""The counted operations and bytes of the GPU execution, and the README's table of them."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from prudent.bench import aot, logprob_cost
from prudent.bench.logprob_cost import D, T, V, cost
from prudent.kernels.linear_logprob.contract import DERIVATIVE


def test_the_readmes_table_is_what_is_counted() -> None:
    text = (aot.KERNELS / "linear_logprob" / "README.md").read_text(encoding="utf-8")
    assert text.split("<!-- cost:begin -->")[1].split("<!-- cost:end -->")[0].strip() == logprob_cost.table()


@pytest.mark.parametrize(("keep", "trained", "entropy", "products"), [
    (0, True, True, 4), (2 * T * V, True, True, 3), (0, False, True, 3), (DERIVATIVE, False, False, 2),
])  # fmt: skip
def test_the_products_of_each_way(keep: int, trained: bool, entropy: bool, products: int) -> None:
    assert cost(keep, trained, entropy).products == products


def test_kept_bytes_are_the_budget_and_the_peaks() -> None:
    peaks = 4 * T * (-(-V // 2048) + 1)
    assert cost(2 * T * V, True, False).kept == 2 * T * V + peaks
    assert cost(DERIVATIVE, False, False).kept == 2 * T * D


def test_no_way_is_bound_by_memory() -> None:
    """The estimate of each way is at most 20 % above its products at the assumed rate."""
    for strategy in logprob_cost.STRATEGIES.values():
        found = cost(*strategy)
        assert found.seconds <= 1.2 * found.products * 2 * T * D * V / logprob_cost.PRODUCT_RATE
