"""`import prudent`: its time, and the packages that it imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def run(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_prudent_brings_no_transformers_and_takes_under_two_seconds_beyond_torch(tmp_path):
    code = (
        "import time, sys, torch; start = time.perf_counter(); import prudent; took = time.perf_counter() - start; "
        "print(took, sorted({'transformers', 'pydantic', 'peft', 'datasets'} & set(sys.modules)))"
    )
    took, heavy = run(code, tmp_path).split(" ", 1)
    assert heavy == "[]"
    assert float(took) < 2.0


def test_a_name_that_does_not_exist_is_an_attribute_error():
    import prudent

    with pytest.raises(AttributeError, match="no attribute 'EnsembleHeed'"):
        prudent.EnsembleHeed  # noqa: B018


@pytest.mark.parametrize("first", ["prudent", "transformers.integrations.hub_kernels"])
def test_python_in_the_root_of_the_checkout_registers_the_ops_once(first):
    """There, `kernels` is a top-level package, and transformers imports any package of that name."""
    code = f"import {first}, prudent; prudent.EnsembleRewardModel; import kernels; print(kernels is prudent.kernels)"
    assert run(code, REPOSITORY) == "True"
