"""Compile every Triton launch of the package ahead of time, for GPUs that this machine may lack.

    prudent bench --aot [--target sm_90 ...] [--op ensemble_reward ...] [--full] [--markdown | --write-readme]

Each op's `shipped.py` has `shipped(target, full)`, and may name in `SHOWN` labels that its README shows beside each
kernel's first. The module records its launches and derives each signature from the recorded arguments, specialised as
by Triton's own launcher. The machine code tells registers, stack, shared memory, the widest load and the matrix
instruction; the budget below limits them.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from ..kernels.launch import Launch, recording
from ..rlhf.report.words import aligned

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
# bytes of spilled registers a thread: ptxas may spill a word or two to fit one more program
STACK_BUDGET = 8
# bytes a program: all that a gfx942 program can have; three such programs fit an sm_90 multiprocessor
SHARED_BUDGET = 64 * 1024
# least bytes a thread of a kernel's widest load: a warp then reads 256 contiguous bytes or more at a time
LOAD_BUDGET = 8
# (op, kernel) with narrower loads, and the reason; with 4 bytes a thread a warp still reads 128 contiguous bytes
NARROW = {
    (
        "advantages",
        "advantage",
    ): "rows of any stride and length, masked token by token; a small op beside a model's step",
    ("advantages", "whiten"): "as `advantage`",
    ("ensemble_reward", "product_gradient"): "reads rows of 2K + 1 numbers, which only one number's size aligns",
}


class Target(NamedTuple):
    """A GPU to compile for. Per multiprocessor: `shared` bytes, `warps` and `registers` (0 for AMD, where accumulation
    registers make the count ambiguous). `warp`: threads of a warp."""

    backend: str
    arch: int | str
    warp: int
    shared: int
    warps: int
    registers: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 164 * 1024, 64, 65536),
    "sm_90": Target("cuda", 90, 32, 228 * 1024, 64, 65536),
    "sm_100": Target("cuda", 100, 32, 228 * 1024, 64, 65536),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024, 32, 0),
}
_POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8", torch.int8: "*i8", torch.bool: "*i1",
}  # fmt: skip
_MATRIX = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync|wmma\.mma|v_mfma)\w*")


class Entry(NamedTuple):
    """A launch to compile, and the labels of the shipped cases that need it."""

    op: str
    target: str
    labels: tuple[str, ...]
    launch: Launch


class Compiled(NamedTuple):
    """Resources of one entry's machine code. `stack` and `widest_load` in bytes a thread, `shared` in bytes a program.

    `stack`: local memory, which holds spilled registers (the kernels have no arrays or calls that would use it too).
    `programs`: how many fit a multiprocessor by registers, shared memory and warps (0: not estimated). `matrix`: the
    instruction, "fp32 multiply-add" for an exact fp32 product, which no matrix unit does, or "none needed".
    """

    entry: Entry
    registers: int
    stack: int
    shared: int
    widest_load: int
    matrix: str
    programs: int

    def over_budget(self) -> list[str]:
        """One phrase for each number that exceeds the budget."""
        over = []
        if self.stack > STACK_BUDGET:
            over.append(f"{self.stack} bytes of stack (spilled registers), {STACK_BUDGET} allowed")
        if self.shared > SHARED_BUDGET:
            over.append(f"{self.shared} bytes of shared memory, {SHARED_BUDGET} allowed")
        if self.widest_load < LOAD_BUDGET and not narrow_reason(self.entry):
            over.append(f"no load wider than {self.widest_load} bytes")
        if self.matrix == "missing":
            over.append("no matrix instruction")
        return over


def kernel_name(entry: Entry) -> str:
    """The kernel's name in the tables."""
    return str(entry.launch.kernel.__name__).removesuffix("_kernel")


def narrow_reason(entry: Entry) -> str:
    """Why the entry's kernel may load less than LOAD_BUDGET bytes at a time; "" if it may not."""
    return NARROW.get((entry.op, kernel_name(entry)), "")


def ops() -> list[str]:
    """Every op with Triton launches to compile, in alphabetical order."""
    return sorted(path.parent.name for path in KERNELS.glob("*/shipped.py"))


def _shipped(op: str) -> Any:
    return importlib.import_module(f"..kernels.{op}.shipped", __package__)


def entries(op: str, target: str, full: bool) -> list[Entry]:
    """The op's shipped launches for `target`; launches that differ only in their label are one entry."""
    found: dict[tuple[Any, ...], tuple[list[str], Launch]] = {}
    for label, run in _shipped(op).shipped(target, full):
        with recording() as launches:
            run()
        for launch in launches:
            signature, constants, attributes = specialise(launch)
            key = (launch.kernel.__name__, launch.config, repr((signature, constants, attributes)))
            labels, _ = found.setdefault(key, ([], launch))
            if label not in labels:
                labels.append(label)
    return [Entry(op, target, tuple(labels), launch) for labels, launch in found.values()]


def specialise(launch: Launch) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """(signature, constants, attributes) as in Triton's launcher: the integer 1 is a constant; an integer divisible by
    16 is marked so, and so is every pointer (the package's tensors are aligned to 16 bytes) of which the kernel does
    not say that any address will do.
    """
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    aligned = [["tt.divisibility", 16]]
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments.get(parameter.name, parameter.default)
        varies = isinstance(value, int) and parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not varies):
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                attributes[(i,)] = aligned
        elif isinstance(value, bool):
            signature[parameter.name] = "u1"
        elif isinstance(value, float):
            signature[parameter.name] = parameter.annotation_type or "fp32"
        else:
            wide = "i32" if -(2**31) <= value < 2**31 else "i64"
            signature[parameter.name] = parameter.annotation_type or wide
            if value % 16 == 0 and not varies:
                attributes[(i,)] = aligned
    return signature, constants, attributes


def compile_launch(launch: Launch, target: str) -> Any:
    """Triton's compiled kernel of a recorded launch, with its PTX or AMD assembly and its binary in `.asm`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    to = TARGETS[target]
    signature, constants, attributes = specialise(launch)
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget(to.backend, to.arch, to.warp), options=launch.config.options())


def inspect(entry: Entry) -> Compiled:
    """Compile one entry and read its machine code."""
    kernel = compile_launch(entry.launch, entry.target)
    to, shared = TARGETS[entry.target], kernel.metadata.shared
    if to.backend == "hip":
        text = kernel.asm["amdgcn"]
        registers = _amd(text, "vgpr_count")
        # scalar registers spill to lanes of vector registers, not to memory
        stack = max(_amd(text, "private_segment_fixed_size"), 4 * _amd(text, "vgpr_spill_count"))
    else:
        text = kernel.asm["ptx"]
        used = _resources(kernel.asm["cubin"])
        registers, stack = used["REG"], used["STACK"]
    dots = re.findall(r"tt\.dot [^\n]*", kernel.asm["ttir"])
    # NVIDIA's matrix units do every product except that of fp32 operands in full precision
    on_units = [dot for dot in dots if to.backend == "hip" or "inputPrecision" in dot or "xf32> *" not in dot]
    found = _MATRIX.search(text)
    matrix = "none needed" if not dots else "fp32 multiply-add"
    if on_units:
        matrix = found.group(1).replace(".mma_async", "").removeprefix("v_") if found else "missing"
    programs = _programs(to, registers, shared, entry.launch.config.num_warps)
    widest = _widest_load(text, to.backend)
    return Compiled(entry, registers, stack, shared, widest, matrix, programs)


def _amd(text: str, name: str) -> int:
    return int(re.findall(rf"\.{name}:\s+(\d+)", text)[0])


def _resources(binary: bytes) -> dict[str, int]:
    """REG and STACK from the cuobjdump in Triton's package. STACK includes spills; LOCAL does not."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", text)}


def _widest_load(text: str, backend: str) -> int:
    """Bytes of a thread's widest read of global memory, asynchronous copies to shared memory included."""
    if backend == "hip":
        widths = re.findall(r"(?:global|buffer)_load_(?:lds_)?(?:dwordx?(\d*)|u?short|[su]byte)", text)
        return max((4 * int(width or 1) for width in widths), default=0)
    loads = re.findall(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.[busf](\d+)", text)
    widths = [int(count or 1) * int(bits) // 8 for count, bits in loads]
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+|\d+)(?:, |;)", text)
    if "cp.async.bulk" in text:
        copies.append("16")
    return max([*widths, *(int(size, 0) for size in copies)], default=0)


def _programs(to: Target, registers: int, shared: int, warps: int) -> int:
    """Programs that fit one multiprocessor: a warp gets registers in units of 256, and each program's shared memory
    takes 1 KiB more than it asked for."""
    if not to.registers:
        return 0
    by_registers = to.registers // (-(-registers * to.warp // 256) * 256) // warps
    return min(by_registers, to.warps // warps, to.shared // (shared + 1024), 32)


def survey(names: Iterable[str], targets: Iterable[str], full: bool = False, progress: bool = False) -> list[Compiled]:
    """Compile every shipped launch of the ops `names` for `targets`. Seconds each; Triton caches them on disk."""
    todo = [entry for op in names for target in targets for entry in entries(op, target, full)]
    bar = tqdm(todo, desc="ahead of time", unit="kernel", disable=not progress, file=sys.stderr)
    return [inspect(entry) for entry in bar]


HEADER = (
    "kernel", "target", "case", "tile", "warps", "stages", "registers", "stack", "shared", "programs/SM", "widest load",
    "matrix instruction",
)  # fmt: skip
CONFIG_COLUMNS = 6  # of HEADER: those that need no compiler


def config_cells(entry: Entry) -> tuple[str, ...]:
    """A row's first CONFIG_COLUMNS cells."""
    config, others = entry.launch.config, len(entry.labels) - 1
    case = entry.labels[0] + (f" and {others} more" if others else "")
    tile = f"{config.block_rows} x {config.block_dim}"
    return kernel_name(entry), entry.target, case, tile, str(config.num_warps), str(config.num_stages)


def cells(compiled: Compiled) -> tuple[str, ...]:
    """One row of the table, as text."""
    return (
        *config_cells(compiled.entry),
        *(str(compiled.registers), str(compiled.stack), f"{compiled.shared / 1024:.1f} KiB"),
        *(str(compiled.programs or "-"), f"{compiled.widest_load} B", compiled.matrix),
    )


def table(rows: Sequence[Compiled], markdown: bool = False) -> str:
    """The rows in aligned columns, or as Markdown."""
    lines = [HEADER, *(cells(row) for row in rows)]
    if markdown:
        body = ["| " + " | ".join(line) + " |" for line in lines]
        body.insert(1, "|" + " --- |" * len(HEADER))
        return "\n".join(body)
    return aligned(lines, left=range(len(HEADER)))


BEGIN, END = "<!-- aot:begin -->", "<!-- aot:end -->"


def common(found: Sequence[Entry]) -> list[int]:
    """Indices in `found` of the entries that a README shows: for each kernel and target the first case, and after them
    those whose first label is one of the op's `SHOWN`."""
    first: dict[tuple[str, str], int] = {}
    more: list[tuple[int, int]] = []
    for i, entry in enumerate(found):
        shown = getattr(_shipped(entry.op), "SHOWN", ())
        if first.setdefault((entry.launch.kernel.__name__, entry.target), i) != i and entry.labels[0] in shown:
            more.append((1 + shown.index(entry.labels[0]), i))
    kernels = list(dict.fromkeys(name for name, _ in first))
    order = sorted(
        [*((0, i) for i in first.values()), *more],
        key=lambda at: (kernels.index(found[at[1]].launch.kernel.__name__), at[0]),
    )
    return [i for _, i in order]


def readme_block(op: str, rows: Sequence[Compiled]) -> str:
    """The marked block of the op's README: each kernel's common cases, and the greatest numbers of all `rows`, which
    are the launches of the short table for every target."""
    shown = [rows[i] for i in common([row.entry for row in rows])]
    spilling, most = sum(row.stack > 0 for row in rows), max(row.stack for row in rows)
    worst = (
        f"Over all {len(rows)} launches that the command compiles: at most {max(row.registers for row in rows)} "
        f"registers a thread and {max(row.shared for row in rows) / 1024:.1f} KiB of shared memory a program; "
        + (
            f"{spilling} spill, at most {most} bytes of stack a thread."
            if spilling
            else "none has a stack to spill to."
        )
    )
    import triton

    by = "Triton " + ".".join(triton.__version__.split(".")[:2])
    command = f"`prudent bench --aot --op {op}` compiles them ahead of time, here by {by}; nothing was run on a GPU."
    said = "\n\n".join([worst, *remarks(rows)])
    return f"{BEGIN}\n{command}\n\n{table(shown, markdown=True)}\n\n{said}\n{END}"


def remarks(rows: Iterable[Compiled]) -> list[str]:
    """Sentences that explain narrow loads and matrix instructions in the table."""
    rows = list(rows)
    said = [
        f"Loads of less than {LOAD_BUDGET} bytes are allowed in `{name}`: {reason}."
        for (op, name), reason in NARROW.items()
        if any((row.entry.op, kernel_name(row.entry)) == (op, name) for row in rows)
    ]
    if any(row.matrix == "mma.sync" and row.entry.target in ("sm_90", "sm_100") for row in rows):
        said.append(
            "mma.sync on sm_90 and sm_100 is where a tile has fewer than the 64 rows of a wgmma or tcgen05.mma, so "
            "that a small batch has a program for every multiprocessor or the gradient's sums stay in registers."
        )
    return said


def write_readme(op: str, rows: Sequence[Compiled]) -> Path:
    """Write the block between its markers in the op's README. ValueError if the README has no markers."""
    path = KERNELS / op / "README.md"
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{op}: README.md: expected the lines {BEGIN} and {END}, got a file without them")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text(before + readme_block(op, rows) + after, encoding="utf-8")
    return path


def parser() -> argparse.ArgumentParser:
    """The flags of `prudent bench --aot`."""
    flags = argparse.ArgumentParser(
        prog="prudent bench --aot", description="Compile every shipped Triton launch ahead of time, with no GPU."
    )
    flags.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: all four")
    flags.add_argument("--op", nargs="+", choices=ops(), default=ops(), help="default: all")
    flags.add_argument("--full", action="store_true", help="every row of the tables, not only common ones (minutes)")
    flags.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    flags.add_argument("--write-readme", action="store_true", help="also write the common table into each op's README")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if everything is inside its budget, else 1, with the excess on stderr."""
    given = parser().parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        raise ImportError("bench --aot: triton is needed: pip install 'prudent[test]'")
    if given.write_readme:
        given.target, given.full = list(TARGETS), False
    rows: list[Compiled] = []
    for op in given.op:
        rows += (found := survey([op], given.target, given.full, progress=True))
        if given.write_readme:
            print(f"written: {write_readme(op, found)}", file=sys.stderr)
    print("\n\n".join([table(rows, given.markdown), *remarks(rows)]))
    over = [(row, phrase) for row in rows for phrase in row.over_budget()]
    for row, phrase in over:
        print(f"out of budget: {', '.join(config_cells(row.entry)[:3])}: {phrase}", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
