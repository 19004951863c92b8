"""The parts that all studies share: the command that reproduces their numbers, and their output folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prudent.rlhf.job.config import load_config
from prudent.rlhf.study import learning_report, stochastic_report, toy_report
from prudent.rlhf.study.learning import LearningConfig
from prudent.rlhf.study.result import command
from prudent.rlhf.study.stochastic import StochasticConfig, run_stochastic
from prudent.rlhf.study.toy import ToyConfig, run_toy

RESULTS = Path(__file__).parents[3] / "bench" / "results"


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        ((), "prudent study toy --seeds 20"),
        (("seeds=3", "sensitivity=false"), "prudent study toy --seeds 3 --set sensitivity=false"),
        (
            ("reward.activation=relu", "policy.kl=1e-5", "output=elsewhere"),
            "prudent study toy --seeds 20 --set reward.activation=relu --set policy.kl=1e-05",
        ),
    ],
)
def test_the_command_has_every_key_that_was_changed(sets: tuple[str, ...], expected: str) -> None:
    config = load_config(ToyConfig, None, sets)
    assert command("toy", config) == expected
    typed = [word for word in expected.split() if "=" in word]
    again = load_config(ToyConfig, None, typed, seeds=config.seeds, output=config.output)
    assert again == config


def test_a_list_and_a_model_are_in_the_command_as_a_shell_takes_them() -> None:
    config = load_config(LearningConfig, None, ["kl=[0, 0.1]"], model="a model")
    assert command("learning", config) == ("prudent study learning --model 'a model' --seeds 3 --set 'kl=[0.0, 0.1]'")


@pytest.mark.parametrize(
    ("name", "kind", "report"),
    [
        ("toy", ToyConfig, toy_report),
        ("toy-100", ToyConfig, toy_report),
        ("stochastic", StochasticConfig, stochastic_report),
        ("learning", LearningConfig, learning_report),
    ],
)
def test_the_committed_pages_are_what_their_numbers_give(name: str, kind: Any, report: Any) -> None:
    metrics = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert report.markdown(metrics) == (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    assert metrics["command"] == command(name.partition("-")[0], kind.model_validate(metrics["config"]))


@pytest.mark.parametrize(
    ("run", "config"),
    [
        (run_toy, ToyConfig(seeds=2, reward={"steps": 2}, policy={"steps": 1}, sensitivity=False)),
        (run_stochastic, StochasticConfig(seeds=2, steps=1)),
    ],
)
def test_a_study_writes_over_its_own_results_alone(run: Any, config: Any, tmp_path: Path) -> None:
    config = config.model_copy(update={"output": tmp_path / "study"})
    run(config, progress=False)
    run(config, progress=False)
    with pytest.raises(ValueError, match=r"holds a run with another seeds \(2 there, 3 here\)"):
        run(config.model_copy(update={"seeds": 3}), progress=False)
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(ValueError, match="expected a new or empty folder or one of a run"):
        run(config.model_copy(update={"output": tmp_path}), progress=False)
    other = {run_toy: run_stochastic, run_stochastic: run_toy}[run]
    before = (tmp_path / "study" / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match=r"config\.yaml: unknown key"):
        other({run_toy: StochasticConfig, run_stochastic: ToyConfig}[run](output=tmp_path / "study"), progress=False)
    assert (tmp_path / "study" / "config.yaml").read_bytes() == before
