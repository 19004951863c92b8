"""The structure of the package: imports go one way and never in a circle, and no file exceeds 400 lines."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 400  # lines
PARTS = ("kernels", "engine", "rlhf", "bench")

# a room may import the rooms before it, never one after it; rooms of rlhf/ are named by their folder
ORDER = (
    *("kernels", "engine", ""),  # "": the package's own __init__.py, which hands on names from any room
    *("job", "data", "models", "report", "sampling", "evaluation", "reward", "export", "doors", "serve"),
    *("ppo", "plan", "demo", "study"),
    *("commands", "study_commands", "cli", "bench"),
)


def files() -> dict[str, Path]:
    """Dotted module name -> file, of all that is installed."""
    paths = [*ROOT.glob("*.py"), *(path for part in PARTS for path in (ROOT / part).rglob("*.py"))]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths if path.name != "setup.py"}
    return {name.removesuffix("__init__").removesuffix("."): path for name, path in names.items()}


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of ours that a module imports, at its top or in a function."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = [part for part in package[: len(package) - node.level + 1] if part]
            source = ".".join([*above, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                inner = f"{source}.{alias.name}".strip(".")
                yield inner if inner in known else source


def graph() -> dict[str, set[str]]:
    known = files()
    return {name: {other for other in imports(name, path, known) if other != name} for name, path in known.items()}


def room(name: str) -> str:
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == "rlhf" and rest else first


def test_every_import_names_a_module_that_exists() -> None:
    known = files()
    assert {(name, other) for name, others in graph().items() for other in others if other not in known} == set()


def test_imports_go_one_way() -> None:
    place = {name: number for number, name in enumerate(ORDER)}
    upward = [
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in others
        if name not in ("", "rlhf") and place[room(other)] > place[room(name)]
    ]
    assert upward == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_file_is_longer_than_400_lines() -> None:
    tests = {str(path): path for path in (ROOT / "tests").rglob("*.py")}
    sources = {str(path): path for part in PARTS for path in (ROOT / part).rglob("*") if path.suffix in (".cpp", ".h")}
    lengths = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n")
        for path in (files() | tests | sources).values()
    }
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}
