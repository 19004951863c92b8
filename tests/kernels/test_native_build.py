"""The native library: failed builds, linked symbols, schemas, choice of instruction set, and running without it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import prudent
from prudent.kernels import native
from prudent.kernels.advantages import cpu as advantages_cpu
from prudent.kernels.advantages.contract import Inputs as AdvantageInputs
from prudent.kernels.ensemble_reward import cpu as ensemble_cpu
from prudent.kernels.ensemble_reward import reference
from prudent.kernels.ensemble_reward.contract import Inputs as EnsembleInputs
from prudent.kernels.ensemble_reward.contract import Needs
from prudent.kernels.preference_step import cpu as preference_cpu
from prudent.kernels.preference_step.contract import Inputs as PreferenceInputs

REPOSITORY = Path(__file__).resolve().parents[2]
WITHOUT = not native.LIBRARY.is_file() or os.environ.get("PRUDENT_NATIVE") == "0"
needs_library = pytest.mark.skipif(WITHOUT, reason="no native CPU library, or PRUDENT_NATIVE=0")


def fields(inputs: Any, last: str) -> tuple[str, ...]:
    """The names of the fields up to `last`."""
    names: tuple[str, ...] = inputs._fields
    return names[: names.index(last) + 1]


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    """Forget the process's cached choices, before and after the test."""
    caches = (native.load, native._default_index)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", str(folder / "temp")]
    command += ["--build-lib", str(folder / "lib")]
    return subprocess.run(command, cwd=REPOSITORY, env=os.environ | environment, capture_output=True, text=True)


def test_a_build_that_fails_says_what_to_install_and_how_to_go_on_without(tmp_path: Path) -> None:
    done = build(tmp_path, CXX="/bin/false", CMAKE_ARGS="", PRUDENT_NATIVE="1")
    assert done.returncode != 0
    *_, message = done.stderr.partition("prudent: the native CPU library was not built")
    assert "configuration failed" in message
    assert "apt install g++" in message
    assert "pip install cmake ninja" in message
    assert "PRUDENT_NATIVE=0 pip install" in message
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_the_build_is_left_out_when_asked(tmp_path: Path) -> None:
    done = build(tmp_path, CXX="/bin/false", PRUDENT_NATIVE="0")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_the_library_asks_for_nothing_of_torch_but_its_c_interface_and_nothing_of_python() -> None:
    listing = subprocess.check_output(["nm", "-D", "--undefined-only", native.LIBRARY], text=True)
    wanted = [line.split()[-1] for line in listing.splitlines()]
    mine = [w for w in wanted if not w.startswith(("_ZSt", "_ZNSt", "_ZNKSt", "_ZTVSt", "_ZTISt", "_ZTVN10__cxxabiv1"))]
    assert any(w.startswith("aoti_torch_") for w in mine)
    assert not [w for w in mine if w.startswith(("Py", "_Py"))]
    assert not [w for w in mine if w.startswith("_Z") and ("torch" in w or "c10" in w or "2at" in w)]


ENSEMBLE = (  # the aggregation as numbers
    *(name for name in EnsembleInputs._fields if name != "aggregation"),
    *ensemble_cpu.NativeSpec._fields,
    "isa",
)
TAKEN = {
    "advantages": (*fields(AdvantageInputs, "mask"), *advantages_cpu.NativeOptions._fields),
    "ensemble_reward_forward": (*ENSEMBLE, "keep"),
    "ensemble_reward_backward": (
        *(f"grad_{name}" for name in ("reward", "mean", "std", "sum", "distance")), *ENSEMBLE, "saved",
        *(f"need_{name}" for name in Needs._fields),
    ),
    "preference_step": (*fields(PreferenceInputs, "seed"), *preference_cpu.NativeOptions._fields),
}  # fmt: skip


@needs_library
@pytest.mark.parametrize("name", TAKEN)
def test_the_native_ops_take_what_python_gives_them_by_position(name: str) -> None:
    assert native.load()
    schema = getattr(torch.ops.prudent_native, name).default._schema
    assert tuple(argument.name for argument in schema.arguments) == TAKEN[name]


@needs_library
def test_the_fastest_supported_instruction_set_is_taken(fresh_choice: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRUDENT_CPU_ISA", raising=False)
    assert native.supported_isas()[0] == "generic"
    assert native.isa() == native.supported_isas()[-1]
    assert native.LIBRARY.parent == Path(prudent.__file__).parent


@needs_library
def test_the_environment_forces_an_instruction_set(fresh_choice: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUDENT_CPU_ISA", "generic")
    assert native.isa() == "generic"


@needs_library
def test_an_unknown_instruction_set_is_refused_by_the_op(fresh_choice: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUDENT_CPU_ISA", "avx1024")
    choices = ", ".join(native.supported_isas())
    with pytest.raises(ValueError, match=rf"^PRUDENT_CPU_ISA: expected one of {choices}, got 'avx1024'$"):
        prudent.ensemble_reward(torch.ones(2, 3), torch.ones(2, 3))


@needs_library
def test_an_instruction_set_the_machine_lacks_is_refused(fresh_choice: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "supported_isas", lambda: ("generic",))
    monkeypatch.setenv("PRUDENT_CPU_ISA", "avx2")
    with pytest.raises(ValueError, match=r"expected one of generic, got 'avx2' \(this machine lacks it\)$"):
        native.isa()


def one_call() -> tuple[torch.Tensor, torch.Tensor]:
    hidden, weight = torch.randn(4, 6), torch.randn(4, 6)
    inputs = EnsembleInputs(
        hidden=hidden, weight=weight, bias=None, rows=None, norm_weight=None, seed=None, shift=None, scale=None,
        std_ref=None, group=None, group_size=0, norm_eps=1e-6, std_floor=1e-3, aggregation="tradeoff:0.4",
    )  # fmt: skip
    return prudent.ensemble_reward(hidden, weight).reward, reference.forward(inputs)[0]


@pytest.mark.usefixtures("fresh_choice")
def test_without_the_library_the_reference_serves_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_C.so")
    monkeypatch.delenv("PRUDENT_NATIVE", raising=False)
    with pytest.warns(RuntimeWarning, match="slower reference.*pip install --no-build-isolation -e ") as caught:
        got, want = [one_call() for _ in range(2)][-1]
    assert len(caught) == 1
    assert torch.equal(got, want)
    assert not ensemble_cpu.available()
    assert native.supported_isas() == ()
    with pytest.raises(RuntimeError, match="not loaded"):
        native.isa()


@pytest.mark.usefixtures("fresh_choice")
def test_a_library_that_does_not_load_is_named_in_the_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_C.so").write_text("not a library")
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_C.so")
    monkeypatch.delenv("PRUDENT_NATIVE", raising=False)
    with pytest.warns(RuntimeWarning, match="does not load"):
        assert not ensemble_cpu.available()


@needs_library
@pytest.mark.usefixtures("fresh_choice")
@pytest.mark.parametrize("found", [1, native.VERSION + 1])
def test_a_library_of_another_version_is_not_used_and_the_warning_says_reinstall(
    monkeypatch: pytest.MonkeyPatch, found: int
) -> None:
    monkeypatch.setattr(native, "_version", lambda: found)
    monkeypatch.delenv("PRUDENT_NATIVE", raising=False)
    with pytest.warns(RuntimeWarning, match=rf"another version of prudent \({found}, expected.*reinstall") as caught:
        got, want = one_call()
    assert len(caught) == 1
    assert torch.equal(got, want)
    assert not ensemble_cpu.available()


@needs_library
def test_a_library_from_before_versions_counts_as_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native._version() == native.VERSION
    monkeypatch.setattr(torch.ops, "prudent_native", object())
    assert native._version() == 1


@pytest.mark.usefixtures("fresh_choice")
def test_asked_to_go_without_it_there_is_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUDENT_NATIVE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got, want = one_call()
    assert torch.equal(got, want)
