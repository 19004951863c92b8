"""Machine code for AMD of every hand-over between programs, compiled with no GPU.

On gfx942 a barrier does not wait for stores in flight, and the release in front of the counting add waits for those of
its own wave alone. So each wave must wait for its stores before the barrier, the counting wave must write the L2 back
before the add and invalidate its caches after it, and another barrier must keep the other waves' reads behind that.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from prudent.bench import aot  # noqa: E402
from prudent.kernels import arrivals, triton_arrivals  # noqa: E402
from prudent.kernels.launch import Config, Launch  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="under the interpreter nothing is compiled")

KERNELS = Path(arrivals.__file__).parent
WAIT, BARRIER, WRITE_BACK, INVALIDATE = "s_waitcnt vmcnt(0)", "s_barrier", "buffer_wbl2 sc1", "buffer_inv sc1"
ADD = re.compile(r"(global|flat|buffer)_atomic_add\b")
STORE, LOAD = re.compile(r"(global|flat|buffer)_store"), re.compile(r"(global|flat|buffer)_load")
JUMP = re.compile(r"s_c?branch|\.LBB\w+:")


def instructions(launch: Launch) -> list[str]:
    """The gfx942 instructions and labels of a launch, one a line."""
    lines = (line.split(";")[0].strip() for line in aot.compile_launch(launch, "gfx942").asm["amdgcn"].splitlines())
    return [line for line in lines if line and (line.startswith(".LBB") or not line.startswith("."))]


def faults(code: list[str], add: int) -> list[str]:
    """What the hand-over whose counting add is `code[add]` lacks."""

    def back(what: str, start: int) -> int:
        return next((i for i in range(start, -1, -1) if code[i] == what), -1)

    def on(what: str, start: int) -> int:
        return next((i for i in range(start, len(code)) if code[i] == what), len(code))

    written = back(WRITE_BACK, add)
    first = last = back(BARRIER, written)  # there are two in a row: ours, and that of the scalar add
    earlier = back(BARRIER, last - 1)
    if not any(STORE.match(line) or JUMP.match(line) for line in code[earlier:last]):
        first = earlier
    waited = back(WAIT, first)
    invalid, met = on(INVALIDATE, add), on(BARRIER, add)
    found = {
        "each wave waits for its stores, without a jump and without another store, before the barrier": (
            0 <= waited < first and not any(STORE.match(line) or JUMP.match(line) for line in code[waited:first])
        ),
        "no store between the barrier and the add": not any(map(STORE.match, code[first:add])),
        "the L2 is written back after the barrier, and waited for": last < written < back(WAIT, add) < add,
        "the add is done before the caches are invalidated": add < on(WAIT, add) < invalid,
        "no wave reads before that": invalid < met and not any(map(LOAD.match, code[add:met])),
    }
    return [what for what, holds in found.items() if not holds]


def hand_overs() -> dict[str, Launch]:
    """A shipped launch for each way in which each kernel hands over."""
    found: dict[str, Launch] = {}
    for op in aot.ops():
        for entry in aot.entries(op, "gfx942", False):
            given = entry.launch.arguments
            if "STORES_DONE" in given:
                ways = (given.get("SPLITS", 1) > 1, given.get("CENTRE"), given.get("distance") is not None)
                name = f"{aot.kernel_name(entry)}: split {ways[0]}, centre {ways[1]}, distance {ways[2]}"
                found.setdefault(name + (", of batch" if given.get("OF_BATCH") else ""), entry.launch)
    return found


HAND_OVERS = hand_overs()


def test_programs_count_themselves_in_one_way_only() -> None:
    counting = {path.name for path in KERNELS.rglob("*.py") if "tl.atomic" in path.read_text(encoding="utf-8")}
    assert counting == {"triton_arrivals.py"}
    assert {name.partition(":")[0] for name in HAND_OVERS} == {"forward", "advantage"}


@pytest.mark.slow
@pytest.mark.parametrize("name", HAND_OVERS)
def test_every_wave_waits_and_the_last_program_reads_what_was_written_back(name: str) -> None:
    code = instructions(HAND_OVERS[name])
    adds = [i for i, line in enumerate(code) if ADD.match(line)]
    assert len(adds) == (2 if "split True" in name else 1)
    assert [faults(code, add) for add in adds] == [[]] * len(adds)


def test_without_the_wait_the_fault_is_found() -> None:
    launch = next(launch for name, launch in HAND_OVERS.items() if "advantage" in name)
    code = instructions(launch._replace(arguments=launch.arguments | {"STORES_DONE": ""}))
    (add,) = [i for i, line in enumerate(code) if ADD.match(line)]
    assert any("each wave waits" in fault for fault in faults(code, add))


@triton.jit
def count(counter, out, STORES_DONE: triton.language.constexpr):  # type: ignore[no-untyped-def]
    triton.language.store(out + triton.language.arange(0, 128), 1)
    if triton_arrivals.arrive(counter, STORES_DONE) == triton.language.num_programs(0) - 1:
        triton.language.store(counter, 0)


@pytest.mark.parametrize(
    ("arch", "lanes"), [("gfx90a", 64), ("gfx942", 64), ("gfx950", 64), ("gfx1100", 32), ("gfx1201", 32)]
)
def test_the_assembler_of_each_family_takes_its_wait(arch: str, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(aot.TARGETS, arch, aot.Target("hip", arch, lanes, 64 * 1024, 32, 0))
    numbers = torch.empty(128, dtype=torch.int32, device="meta")
    wait = arrivals.stores_done(arch)
    launch = Launch(count, (4,), Config(1, 128, 4, 1), {"counter": numbers, "out": numbers, "STORES_DONE": wait})
    code = aot.compile_launch(launch, arch).asm["amdgcn"]
    assert wait in code.split("ASMSTART")[1].split("ASMEND")[0]
