"""Every shipped Triton configuration compiles, spills no register and fits, for GPUs that this machine need not have.

What is compiled is what the launchers launch: the launches are recorded, and their arguments become the signature. The
common configuration is compiled for every target, each of bf16's other widths and each other dtype for one;
PRUDENT_TEST_AOT=all compiles every configuration for every target (minutes).
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from prudent.kernels.ensemble_reward import triton as execution  # noqa: E402
from prudent.kernels.ensemble_reward.configs import assume  # noqa: E402
from prudent.kernels.ensemble_reward.contract import Inputs  # noqa: E402
from prudent.kernels.launch import Launch, recording  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="under the interpreter nothing is compiled")

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip

SHARED_BUDGET = 64 * 1024  # all of a gfx942 program's, and three programs on an sm_90 multiprocessor
# bytes: ptxas leaves up to two words in local memory to reach its next step of occupancy; more is a spill
STACK_BUDGET = 8

# heads, one of each padded width, and rows on both sides of the row-block boundary
HEADS, FEW, MANY = (5, 12, 20, 40), 64, 5000
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def shipped() -> list[Any]:
    """(target, dtype, K, N) to compile."""
    if os.environ.get("PRUDENT_TEST_AOT") == "all":
        cases = list(itertools.product(TARGETS, DTYPES, HEADS, (FEW, MANY)))
    else:
        cases = [(name, torch.bfloat16, 5, FEW) for name in TARGETS]
        cases += [
            ("sm_80", torch.bfloat16, 12, FEW), ("gfx942", torch.bfloat16, 20, FEW), ("sm_90", torch.bfloat16, 40, FEW),
            ("sm_90", torch.bfloat16, 5, MANY), ("sm_100", torch.float16, 5, FEW), ("sm_90", torch.float32, 5, FEW),
            ("sm_80", torch.float64, 5, FEW),
        ]  # fmt: skip
    return [pytest.param(*case, id=f"{case[0]}-{str(case[1])[6:]}-K{case[2]}-N{case[3]}") for case in cases]


@pytest.fixture
def launches() -> Iterator[list[Launch]]:
    with recording() as recorded:
        yield recorded


def call(dtype: torch.dtype, heads: int, rows: int, aggregation: str, **given: Any) -> None:
    """Forward and backward with every optional input, D = 4096 by stride alone: nothing is computed."""
    small = torch.float64 if dtype == torch.float64 else torch.float32
    hidden, weight = torch.zeros(1, dtype=dtype).expand(rows, 4096), torch.zeros(2 * heads, 4096, dtype=small)
    vector = torch.zeros(heads, dtype=small)
    values = {
        "hidden": hidden, "weight": weight, "bias": torch.zeros(2 * heads, dtype=small),
        "rows": torch.zeros(rows, dtype=torch.int64), "norm_weight": torch.zeros(4096, dtype=dtype),
        "seed": torch.zeros(1, dtype=torch.int64), "shift": vector, "scale": vector, "std_ref": vector, "group": None,
        "group_size": 0, "norm_eps": 1e-6, "std_floor": 1e-3, "aggregation": aggregation,
    }  # fmt: skip
    inputs = Inputs(**{**values, **given})  # type: ignore[arg-type]
    saved = execution.forward(inputs, True)[4]
    n, k = inputs.num_rows, inputs.num_heads
    grads = tuple(torch.zeros(shape, dtype=inputs.output_dtype) for shape in ((n,), (n, k), (n, k), ()))
    execution.backward(grads, inputs, saved, (True, True, True, True))  # type: ignore[arg-type]


def compiled(launch: Launch, target: GPUTarget) -> Any:
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        signature[parameter.name] = "constexpr"
        if parameter.is_constexpr or value is None:
            constants[(i,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp64"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    shape = {"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages}
    options = {**shape, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


def resources(kernel: Any, tmp_path: Path) -> dict[str, int]:
    """REG, STACK and LOCAL of the machine code, as cuobjdump prints them."""
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    text = subprocess.run([tool, "-res-usage", str(binary)], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


@pytest.mark.parametrize(("target", "dtype", "heads", "rows"), shipped())
def test_a_shipped_configuration_compiles_without_spills_inside_its_budget(
    target: str, dtype: torch.dtype, heads: int, rows: int, launches: list[Launch], tmp_path: Path,
) -> None:  # fmt: skip
    amd = target.startswith("gfx")
    with assume(target):
        call(dtype, heads, rows, "tradeoff:0.4,centre=batch")
    products = ("forward_kernel", "product_gradient_kernel", "outer_kernel")
    # the small kernels vary with the configuration in their block of D alone: once a target
    common = (dtype, heads, rows) == (torch.bfloat16, 5, FEW)
    wanted = [entry for entry in launches if common or entry.kernel.__name__ in products]
    assert {entry.kernel.__name__ for entry in wanted} >= set(products)
    for launch in wanted:
        name = launch.kernel.__name__
        kernel = compiled(launch, TARGETS[target])
        assert kernel.metadata.shared <= SHARED_BUDGET, name
        if amd:
            assert re.findall(r"\.vgpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"]) == ["0"], name
            assert "mfma" in kernel.asm["amdgcn"] or name not in products
            continue
        used = resources(kernel, tmp_path)
        assert used["LOCAL"] == 0, f"{name}: {used}"
        assert used["STACK"] <= STACK_BUDGET, f"{name}: {used}"
        on_tensor_cores = dtype != torch.float32 and name in products
        assert not on_tensor_cores or re.search(r"mma\.sync|wgmma|tcgen05\.mma", kernel.asm["ptx"]), name


@pytest.mark.parametrize("aggregation", ["median", "lcb:1", "softmin:0.5", "cvar:0.4", "nominal,nominal=relative_std"])
def test_the_other_aggregations_compile_too(aggregation: str, launches: list[Launch], tmp_path: Path) -> None:
    call(torch.bfloat16, 5, FEW, aggregation)
    launch = next(entry for entry in launches if entry.kernel.__name__ == "product_gradient_kernel")
    assert resources(compiled(launch, TARGETS["sm_90"]), tmp_path)["STACK"] <= STACK_BUDGET


def test_group_centring_by_label_and_by_size_compiles(launches: list[Launch]) -> None:
    spec = "mean,centre=group"
    call(torch.bfloat16, 5, FEW, spec, group_size=8)
    call(torch.bfloat16, 5, FEW, spec, group=torch.zeros(64, dtype=torch.int64))
    centring = [launch for launch in launches if launch.kernel.__name__ == "centre_kernel"]
    assert {launch.arguments["labels"] is None for launch in centring} == {True, False}
    for launch in centring:
        compiled(launch, TARGETS["sm_90"])


def test_the_last_arrival_releases_acquires_and_reads_past_the_first_cache(launches: list[Launch]) -> None:
    """The hand-over between programs: partials stored, barrier, add with acq_rel at gpu scope, loads that skip L1."""
    call(torch.bfloat16, 5, FEW, "tradeoff:0.4,centre=batch")
    ptx = compiled(launches[0], TARGETS["sm_90"]).asm["ptx"]
    stored, barrier, added, read = (
        ptx.rindex("st.global", 0, ptx.index("acq_rel")), ptx.rindex("bar.sync", 0, ptx.index("acq_rel")),
        ptx.index("atom.global.gpu.acq_rel.add"), ptx.index("ld.global.cg"),
    )  # fmt: skip
    assert stored < barrier < added < read
