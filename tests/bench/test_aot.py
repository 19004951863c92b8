"""`prudent bench --aot`: the launches it compiles, their specialisation, its output and its exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from prudent.bench import aot  # noqa: E402
from prudent.kernels.launch import Config, Launch  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="under the interpreter nothing is compiled")


@triton.jit(do_not_specialize=["count"])
def scaled_copy(x, out, bias, count, stride, step, factor, BLOCK: triton.language.constexpr):  # type: ignore[no-untyped-def]
    at = triton.language.program_id(0) * stride + triton.language.arange(0, BLOCK) * step
    value = triton.language.load(x + at) * factor
    if bias is not None:
        value += triton.language.load(bias)
    triton.language.store(out + at, value, mask=at < count)


def launch() -> Launch:
    x = torch.empty(4096, device="meta")
    arguments = {
        "x": x, "out": torch.empty_like(x), "bias": None, "count": 4096, "stride": 1024, "step": 1, "factor": 2.0,
        "BLOCK": 1024,
    }  # fmt: skip
    return Launch(scaled_copy, (4,), Config(1, 1024, 4, 2), arguments)


def test_the_signature_is_what_tritons_launcher_would_make() -> None:
    signature, constants, attributes = aot.specialise(launch())
    assert signature == {
        "x": "*fp32", "out": "*fp32", "bias": "constexpr", "count": "i32", "stride": "i32", "step": "constexpr",
        "factor": "fp32", "BLOCK": "constexpr",
    }  # fmt: skip
    assert constants == {(2,): None, (5,): 1, (7,): 1024}
    assert set(attributes) == {(0,), (1,), (4,)}  # 16 divides them; `count` is not to be specialised


@pytest.mark.parametrize("target", aot.TARGETS)
def test_the_machine_code_is_read(target: str) -> None:
    found = aot.inspect(aot.Entry("none", target, ("copy",), launch()))
    assert 0 < found.registers <= 64
    assert (found.stack, found.shared) == (0, 0)
    assert found.widest_load == 16  # 1024 floats over 4 warps
    assert found.matrix == "none needed"
    assert found.programs == (0 if target == "gfx942" else 16)  # 64 warps of a multiprocessor, 4 a program
    assert found.over_budget() == []


def spilling() -> Launch:
    """A shipped kernel with 8192 columns in one warp: 256 values a thread."""
    wide = next(e.launch for e in aot.entries("linear_logprob", "sm_90", True) if "8192 columns" in e.labels[0])
    return wide._replace(config=wide.config._replace(num_warps=1))


def test_a_kernel_that_spills_is_over_its_budget() -> None:
    found = aot.inspect(aot.Entry("linear_logprob", "sm_90", ("one warp",), spilling()))
    assert found.stack > aot.STACK_BUDGET
    assert found.over_budget() == [f"{found.stack} bytes of stack (spilled registers), {aot.STACK_BUDGET} allowed"]
    assert f"1 spill, at most {found.stack} bytes of stack a thread." in aot.readme_block("linear_logprob", [found])


def test_a_narrow_load_needs_a_written_reason() -> None:
    entry = aot.Entry("none", "sm_90", ("copy",), launch())
    narrow = aot.Compiled(entry, 32, 0, 0, 4, "none needed", 1)
    assert narrow.over_budget() == ["no load wider than 4 bytes"]
    (op, name), reason = next(iter(aot.NARROW.items()))
    kernel = next(e for e in aot.entries(op, "sm_90", False) if aot.kernel_name(e) == name)
    excused = narrow._replace(entry=kernel)
    assert excused.over_budget() == []
    assert f"`{name}`: {reason}." in aot.remarks([excused])[0]


@pytest.mark.parametrize(("op", "name"), aot.NARROW)
def test_each_reason_is_of_a_shipped_kernel(op: str, name: str) -> None:
    assert name in {aot.kernel_name(entry) for entry in aot.entries(op, "sm_90", True)}


def test_each_breach_of_the_budget_is_named() -> None:
    entry = aot.Entry("none", "sm_90", ("copy",), launch())
    worst = aot.Compiled(entry, 255, 16, 100_000, 4, "missing", 1)
    assert worst.over_budget() == [
        "16 bytes of stack (spilled registers), 8 allowed",
        "100000 bytes of shared memory, 65536 allowed",
        "no load wider than 4 bytes",
        "no matrix instruction",
    ]


@pytest.mark.parametrize("op", aot.ops())
def test_every_op_ships_each_launch_once_for_every_target(op: str) -> None:
    for target in aot.TARGETS:
        found = aot.entries(op, target, False)
        launches = [(e.launch.kernel.__name__, e.launch.config, repr(aot.specialise(e.launch))) for e in found]
        assert found
        assert len(set(launches)) == len(launches)
        assert len(aot.entries(op, target, True)) >= len(found)


def test_the_table_is_printed_and_a_breach_ends_with_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aot, "entries", lambda op, target, full: [aot.Entry(op, target, ("copy", "again"), launch())])
    arguments = ["--op", "ensemble_reward", "--target", "sm_90"]
    assert aot.main(arguments) == 0
    shown = capsys.readouterr()
    assert shown.out.split("\n")[0].split() == " ".join(aot.HEADER).split()
    assert "scaled_copy" in shown.out
    assert "copy and 1 more" in shown.out
    assert aot.main([*arguments, "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| kernel | target |")
    monkeypatch.setattr(aot, "STACK_BUDGET", -1)
    assert aot.main(arguments) == 1
    assert "out of budget: scaled_copy, sm_90, copy and 1 more: 0 bytes of stack" in capsys.readouterr().err


def test_it_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "prudent.bench.aot", "--op", "advantages", "--target", "sm_90"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "advantage" in done.stdout


def test_without_triton_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match=r"triton is needed: pip install 'prudent\[test\]'"):
        aot.main([])


def test_the_readmes_block_is_replaced_and_the_rest_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "KERNELS", tmp_path)
    monkeypatch.setattr(aot, "_shipped", lambda op: None)
    readme = tmp_path / "some_op" / "README.md"
    readme.parent.mkdir()
    rows = [aot.inspect(aot.Entry("some_op", "sm_90", ("copy",), launch()))]
    readme.write_text("nothing marked")
    with pytest.raises(ValueError, match="expected the lines"):
        aot.write_readme("some_op", rows)
    readme.write_text(f"before\n{aot.BEGIN}\nold\n{aot.END}\nafter\n")
    aot.write_readme("some_op", rows)
    text = readme.read_text()
    assert text.startswith(f"before\n{aot.BEGIN}\n")
    assert text.endswith(f"{aot.END}\nafter\n")
    assert "| scaled_copy | sm_90 | copy | 1 x 1024 | 4 | 2 |" in text
    assert "Over all 1 launches" in text
    assert "old" not in text
