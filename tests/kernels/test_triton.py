"""The Triton execution: under Triton's interpreter on every machine, and on a GPU if there is one.

The cases are in the files triton*_cases.py and run in a child process. `@triton.jit` decides when it decorates a
function whether that function is interpreted, Triton's own library (`tl.sum`, `tl.zeros`) included. Once this process
has imported triton without TRITON_INTERPRET=1 (inductor does, in any torch.compile test), it can no longer interpret;
the other way round, an interpreted triton breaks inductor. The interpreter also patches `triton.language` in place
while it runs. A child process has none of these problems.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
CASES = {
    "ensemble_reward": HERE / "ensemble_reward" / "triton_cases.py",
    "ensemble_reward, trust region": HERE / "ensemble_reward" / "triton_trust_cases.py",
    "ensemble_reward, launches": HERE / "ensemble_reward" / "triton_launch_cases.py",
    "preference_step": HERE / "preference_step" / "triton_cases.py",
    "linear_logprob": HERE / "linear_logprob" / "triton_cases.py",
    "advantages": HERE / "advantages" / "triton_cases.py",
}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_cases(cases: Path, interpret: bool) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", str(cases), "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-12000:]}\n{done.stderr[-2000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("cases", CASES.values(), ids=CASES)
def test_every_case_holds_under_the_interpreter(cases: Path) -> None:
    run_cases(cases, interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cases", CASES.values(), ids=CASES)
def test_every_case_holds_on_a_gpu(cases: Path) -> None:
    run_cases(cases, interpret=False)
