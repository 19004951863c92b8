"""The examples run as they stand, on a small model, and the snippets of their pages are what the doors take."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples"


def run(script: str, *arguments: object, folder: Path) -> str:
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def snippets(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_own_loop_trains_on_the_bare_ops(tiny_chat_folder, reward_folder, tmp_path):
    lines = run("own_loop.py", tiny_chat_folder, reward_folder, 3, folder=tmp_path).splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 0", "step 1", "step 2"]
    losses = [float(line.rpartition(" ")[2]) for line in lines]
    assert len(set(losses)) == 3  # the policy moves


def test_own_loop_is_about_twenty_lines():
    code = (EXAMPLES / "own_loop.py").read_text(encoding="utf-8").partition("for step in")[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 21


@pytest.mark.slow
def test_trl_grpo_prints_reward_and_uncertainty(tiny_chat_folder, reward_folder, tmp_path):
    pytest.importorskip("trl")
    (line,) = run("trl_grpo.py", tiny_chat_folder, reward_folder, 1, folder=tmp_path).splitlines()[-1:]
    for name in ("reward", "prudent/std", "prudent/gap", "prudent/distance", "prudent/foreign", "prudent/truncated"):
        assert f"'{name}':" in line


def test_the_file_of_the_openrlhf_page_is_a_reward_func(reward_folder, scorer):
    (code,) = snippets("examples/openrlhf.md", "python")
    names: dict[str, Any] = {}
    exec(code.replace("runs/reward/model", str(reward_folder)), names)
    prompt = "<|user|> the day <|end|><|assistant|> "
    found = names["reward_func"]([f"{prompt}is good <|end|>"], [prompt], [""])
    want = scorer.score([{"prompt": "the day", "response": "is good"}], aggregation="lcb:1").reward[0]
    assert found["rewards"] == pytest.approx(want, abs=1e-5)


def test_the_settings_of_the_verl_page_name_what_exists():
    source = (ROOT / "rlhf" / "doors" / "verl.py").read_text(encoding="utf-8")
    pages = snippets("examples/verl.md", "")
    assert len(pages) == 2
    for settings in pages:
        given = dict(line.lstrip("+").split("=", 1) for line in settings.strip().splitlines())
        assert f"class {given['reward.reward_manager.name']}(" in source
        assert given["reward.reward_manager.module.path"] == "pkg://prudent.rlhf.doors.verl"
        function = given.get("reward.custom_reward_function.name", "compute_score")
        assert f"def {function}(" in source
        options = [key.rpartition(".")[2] for key in given if ".reward_kwargs." in key]
        assert set(options) <= {"model", "aggregation", "trust"}


@pytest.mark.parametrize("page", ["docs/doors.md", "examples/openrlhf.md"])
def test_every_snippet_is_python_and_imports_what_prudent_has(page):
    for code in snippets(page, "python"):
        compile(code.replace(", ...", ""), page, "exec")
        for line in code.splitlines():
            if line.startswith(("from prudent", "import prudent")):
                if "trl_training" in line:
                    pytest.importorskip("trl")
                exec(line, {})


def test_every_name_that_the_page_says_is_logged_is_logged():
    from prudent.rlhf.doors.uncertainty import metrics_of

    result = {
        "reward": 1.0,
        "nominal": 1.0,
        "worst": 0.0,
        "mean": [1.0],
        "std": [1.0],
        "distance": 2.0,
        "truncated": False,
    }
    page = (ROOT / "docs" / "doors.md").read_text(encoding="utf-8")
    table = page.partition("## What is logged")[2].partition("\n\nTRL has them")[0]
    assert set(re.findall(r"^\| (\w+) \|", table, re.M)) - {"name"} == set(metrics_of([result], [True]))
