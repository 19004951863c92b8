"""The bytes per row that the kernels load and store, against the least possible."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from prudent.bench import traffic
from prudent.bench.traffic_count import Access, Report

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# as bench/traffic_cases.py has them; importing it would import the kernels without their interpreter
ROWS, DIM, HEADS, DIRECTIONS, TOKENS, VOCABULARY = 48, 256, 5, 32, 100, 500
BF16, FP32 = 2, 4


@pytest.fixture(scope="module")
def reports() -> dict[tuple[str, str], Report]:
    """Every counted call, from the command itself."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "prudent.bench.traffic", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[tuple[str, str], Report] = {}
    for entry in json.loads(done.stdout):
        entry["accesses"] = [Access(**{**access, "shape": tuple(access["shape"])}) for access in entry["accesses"]]
        found[entry["op"], entry["mode"]] = Report(**{**entry, "rows": tuple(entry["rows"])})
    return found


def read_once(report: Report, tensor: str, size: int) -> bool:
    """Over all launches together, each of the tensor's `size` bytes is read once."""
    accesses = report.of(tensor)
    return sum(a.read for a in accesses) == sum(a.distinct_read for a in accesses) == size


def written_once(report: Report, tensor: str, size: int) -> bool:
    accesses = report.of(tensor)
    return sum(a.written for a in accesses) == sum(a.distinct_written for a in accesses) == size


@pytest.mark.parametrize("mode", ["forward, norm", "forward", "forward, norm, products kept", "last tokens, norm",
                                  "forward, norm, trust", "forward, trust"])  # fmt: skip
def test_the_forward_reads_each_scored_row_once_in_one_launch(reports: Any, mode: str) -> None:
    report = reports["ensemble_reward", mode]
    assert {access.kernel for access in report.accesses} == {"forward"}
    assert read_once(report, "hidden", ROWS * DIM * BF16)
    assert written_once(report, "mean_out", ROWS * HEADS * FP32)
    assert written_once(report, "std_out", ROWS * HEADS * FP32)
    # beyond the floor: the rewards are read back and written again, centred
    assert report.asked() == report.floor + 2 * FP32


@pytest.mark.parametrize("mode", ["backward, norm", "backward, norm, frozen trunk", "backward, norm, frozen head",
                                  "backward, norm, trust"])  # fmt: skip
def test_the_backward_reads_hidden_once(reports: Any, mode: str) -> None:
    report = reports["ensemble_reward", mode]
    assert read_once(report, "hidden", ROWS * DIM * BF16)
    kept = 2 * HEADS + 1 + (DIRECTIONS + 2 if "trust" in mode else 0)
    assert read_once(report, "saved", ROWS * kept * FP32)


def test_the_backward_writes_hiddens_gradient_once_and_not_at_all_where_the_trunk_is_frozen(reports: Any) -> None:
    for mode in ("backward, norm", "backward, norm, frozen head", "backward, norm, trust"):
        assert written_once(reports["ensemble_reward", mode], "grad_hidden", ROWS * DIM * BF16)
    frozen = reports["ensemble_reward", "backward, norm, frozen trunk"]
    assert not frozen.of("grad_hidden")
    assert not frozen.of("along")


def test_beyond_the_floor_the_backward_moves_the_products_gradient_alone(reports: Any) -> None:
    """16 padded columns and the norm's term: written once and read once, whatever D is."""
    report = reports["ensemble_reward", "backward, norm"]
    assert report.distinct() == report.floor + 2 * (16 + 1) * FP32


def test_a_trust_region_adds_to_a_row_its_distance_and_what_the_backward_keeps_of_it(reports: Any) -> None:
    """Not a byte of hidden: 4 bytes of distance forward; a number for each direction and two more backward."""
    plain, trust = (reports["ensemble_reward", f"forward, norm{region}"] for region in ("", ", trust"))
    assert trust.asked() == plain.asked() + FP32
    backward = reports["ensemble_reward", "backward, norm, trust"]
    assert backward.distinct() == backward.floor + 2 * (16 + 1 + DIRECTIONS + 2) * FP32


def test_a_frozen_head_costs_no_weight_gradient(reports: Any) -> None:
    report = reports["ensemble_reward", "backward, norm, frozen head"]
    assert not report.of("weight_partials")


@pytest.mark.parametrize("loss", ["bt", "brme", "brme sampled"])
def test_a_training_step_reads_the_features_once_and_nothing_else_that_grows_with_them(reports: Any, loss: str) -> None:
    report = reports["preference_step", f"{loss}, batch sum"]
    assert read_once(report, "features", ROWS * DIM * BF16)
    assert report.asked() <= report.floor + 8  # beyond it: the order of the pairs, sorted by head


def test_logprobs_kernels_read_a_tile_of_logits_once_and_write_its_derivative_once(reports: Any) -> None:
    tiles = ROWS * VOCABULARY * FP32
    forward, backward = (reports["linear_logprob", f"{way}, tiles"] for way in ("forward", "backward"))
    assert read_once(forward, "tile", tiles)
    assert not sum(access.written for access in forward.of("tile"))
    assert read_once(backward, "source", tiles)
    assert written_once(backward, "slopes", tiles)


@pytest.mark.parametrize("mode", ["GAE", "GAE, whitened"])
def test_advantages_reads_every_input_of_fp32_once(reports: Any, mode: str) -> None:
    report = reports["advantages", mode]
    for name in ("logprob", "ref_logprob", "value"):
        assert read_once(report, name, ROWS * TOKENS * FP32)
    for name in ("returns", "reward"):
        assert written_once(report, name, ROWS * TOKENS * FP32)


def test_whitening_costs_one_more_pass_over_the_advantages_and_the_mask(reports: Any) -> None:
    plain, whitened = (reports["advantages", mode] for mode in ("GAE", "GAE, whitened"))
    assert whitened.asked() - plain.asked() == TOKENS * (2 * FP32 + 1) + 1


def test_the_table_shows_times_and_the_floor() -> None:
    access = Access("forward", "hidden", (48, 256), read=2000, distinct_read=1000, written=0, distinct_written=0)
    shared = Access("forward", "weight", (10, 256), read=30, distinct_read=10)
    shown = traffic.table([Report("some_op", "forward", (48,), 1000 / 48, [access, shared])])
    assert "48 x 256             2,000    2.00         0       -\n" in shown
    assert "shared by the rows" in shown
    assert "42 asked for (2.00 of the floor), 21 distinct in each launch (1.00), 21 floor" in shown


def test_an_unknown_op_is_named() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prudent.bench.traffic", "--op", "no_such"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "op: expected one of advantages, ensemble_reward" in done.stderr
