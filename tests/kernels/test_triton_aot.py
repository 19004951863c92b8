"""Every shipped Triton configuration compiles, fits, and spills at most two words a thread; no GPU is needed.

Each op's common launches are compiled for every target, and a quarter of the others in its short table for one target
each. PRUDENT_TEST_AOT=all compiles every configuration for every target and compares the READMEs' tables with the
result (minutes).
"""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from prudent.bench import aot  # noqa: E402
from prudent.kernels.ensemble_reward import configs  # noqa: E402
from prudent.kernels.ensemble_reward import triton as execution  # noqa: E402
from prudent.kernels.ensemble_reward.configs import _triton_version, assume  # noqa: E402
from prudent.kernels.ensemble_reward.contract import Inputs  # noqa: E402
from prudent.kernels.launch import Launch, recording  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="under the interpreter nothing is compiled")

NEWEST = _triton_version() >= (3, 8)  # older ones spill more and get other tiles on sm_100 and gfx942
ALL = os.environ.get("PRUDENT_TEST_AOT") == "all"


def chosen(op: str, target: str) -> list[aot.Entry]:
    """The op's launches for `target` that this test compiles."""
    found, turn = aot.entries(op, target, ALL), list(aot.TARGETS).index(target)
    shown = aot.common(found)
    return [entry for i, entry in enumerate(found) if ALL or i in shown or i % (4 * len(aot.TARGETS)) == 4 * turn]


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("op", aot.ops())
def test_a_shipped_configuration_compiles_inside_its_budget(op: str, target: str) -> None:
    over = {aot.config_cells(entry): aot.inspect(entry).over_budget() for entry in chosen(op, target)}
    assert over
    assert not NEWEST or not {row: phrases for row, phrases in over.items() if phrases}


@pytest.mark.skipif(not NEWEST, reason="the tables are those of Triton 3.8 and later")
@pytest.mark.parametrize("op", aot.ops())
def test_the_readmes_table_is_the_codes(op: str) -> None:
    """Compare the configurations always, and the compiler's results if everything is compiled anyway."""
    text = (aot.KERNELS / op / "README.md").read_text(encoding="utf-8")
    block = aot.BEGIN + text.split(aot.BEGIN)[1].split(aot.END)[0] + aot.END
    found = [entry for target in aot.TARGETS for entry in aot.entries(op, target, False)]
    shown = [line.strip("| ").split(" | ")[: aot.CONFIG_COLUMNS] for line in block.splitlines() if line[:2] == "| "]
    assert shown[2:] == [list(aot.config_cells(found[i])) for i in aot.common(found)]
    assert f"Over all {len(found)} launches" in block
    if ALL:
        assert block == aot.readme_block(op, [aot.inspect(entry) for entry in found])


def launched(aggregation: str, num_rows: int = 64) -> list[Launch]:
    """Forward and backward of ensemble_reward on sm_90: bf16, 5 heads, every optional input, tensors without data."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    inputs = Inputs(
        hidden=empty(num_rows, 4096, dtype=torch.bfloat16), weight=empty(10, 4096), bias=empty(10),
        rows=empty(num_rows, dtype=torch.int64), norm_weight=empty(4096, dtype=torch.bfloat16), norm_eps=1e-6,
        seed=empty(1, dtype=torch.int64), shift=empty(5), scale=empty(5), std_ref=empty(5), group=None, group_size=0,
        std_floor=1e-3, aggregation=aggregation,
    )  # fmt: skip
    grads: Any = (empty(num_rows), empty(num_rows, 5), empty(num_rows, 5), empty(), None)
    with recording() as launches, assume("sm_90"):
        saved = execution.forward(inputs, True)[-1]
        execution.backward(grads, inputs, saved, (True, True, True, True))
    return launches


@pytest.mark.parametrize("aggregation", ["median", "lcb:1", "softmin:0.5", "cvar:0.4", "nominal,nominal=relative_std"])
def test_the_other_aggregations_stay_inside_it_too(aggregation: str) -> None:
    for launch in launched(aggregation):
        if "head_or_count" in launch.arguments:  # the kernels that aggregate
            assert not aot.inspect(aot.Entry("ensemble_reward", "sm_90", (aggregation,), launch)).over_budget()


def test_the_last_arrival_releases_acquires_and_reads_past_the_first_cache() -> None:
    """The hand-over between programs: partials stored, barrier, add with acq_rel at gpu scope, loads that skip L1."""
    ptx = aot.compile_launch(launched("tradeoff:0.4,centre=batch")[0], "sm_90").asm["ptx"]
    stored, barrier, added, read = (
        ptx.rindex("st.global", 0, ptx.index("acq_rel")), ptx.rindex("bar.sync", 0, ptx.index("acq_rel")),
        ptx.index("atom.global.gpu.acq_rel.add"), ptx.index("ld.global.cg"),
    )  # fmt: skip
    assert stored < barrier < added < read


LIMITED = [(n, limit) for n, row in zip((64, 8192, 65536), configs.Columns(16).forward(torch.bfloat16), strict=True)
           for limit in row.limits]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("num_rows", "limit"), LIMITED)
def test_no_limit_of_registers_makes_the_forward_spill(num_rows: int, limit: int) -> None:
    launch = launched("tradeoff:0.4,centre=batch", num_rows)[0]
    assert launch.config.maxnreg == next(each for n, each in LIMITED if n == num_rows)
    launch = launch._replace(config=launch.config._replace(maxnreg=limit))
    found = aot.inspect(aot.Entry("ensemble_reward", "sm_90", ("limited",), launch))
    assert (found.stack, found.registers <= limit) == (0, True)
    assert found.programs >= 65536 // (32 * launch.config.num_warps * limit)  # a multiprocessor has 65536 registers


def test_the_backward_loads_a_row_blocks_coefficients_a_block_ahead() -> None:
    """In the loop no product takes what a plain load reads: the loop hands it on to its next turn."""
    launch = next(each for each in launched("tradeoff:0.4") if each.kernel.__name__ == "outer_kernel")
    assert (launch.config.block_rows, launch.config.maxnreg) == (32, 168)
    kernel = aot.compile_launch(launch, "sm_90").asm["ttgir"]
    loop = next(part.split("scf.yield")[0:2] for part in kernel.split("scf.for")[1:] if "async_copy" in part)
    body, handed_on = loop[0], loop[1].split(":")[0]
    coefficients = [line.split(" = ")[0].strip() for line in body.splitlines() if re.search("= tt.load .*f32>", line)]
    assert len(coefficients) == 2  # [32, 16] and [32]
    assert all(re.search(rf"{name}\b", handed_on) for name in coefficients)
