"""The demo's PPO runs at a tiny size: equal starts, no effect on the rest of the demo, resuming, and its claims."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vaderSentiment", reason="the gold scorer is an extra: pip install 'prudent[demo]'")
pytest.importorskip("matplotlib", reason="the pictures are an extra: pip install 'prudent[report]'")
pytest.importorskip("peft", reason="PPO is an extra: pip install 'prudent[train]'")

from prudent.engine import EnsembleHead
from prudent.engine.trust import fit_trust
from prudent.rlhf.demo import ppo as demo_ppo
from prudent.rlhf.demo.demo import DemoConfig, run_demo
from prudent.rlhf.demo.rewards import SINGLE, TRUST, Fitted
from prudent.rlhf.job.log import RunLog, read_metrics
from prudent.rlhf.ppo import loop
from prudent.rlhf.sampling.stored import Rollout

SUBJECTS = ("the food", "the hotel", "my day", "your train", "the film")
STEPS = 7


def _config(model: Path, output: Path, steps: int = STEPS) -> DemoConfig:
    prompts = output.parent / "prompts.txt"
    prompts.write_text("\n".join(f"{s} {v}" for s in SUBJECTS for v in ("was", "is", "is not")) + "\n")
    return DemoConfig(
        output=output,
        model=str(model),
        prompts=prompts,
        held_out_prompts=5,
        best_of=8,
        samples_per_prompt=4,
        pairs=30,
        draws=1,
        max_new_tokens=6,
        dtype="float32",
        batch_rows=24,
        brme={"epochs": 2, "max_steps": 20},
        ppo={"steps": steps, "max_new_tokens": 5, "lora_rank": 2, "lr": 1e-2, "judged": 3},
    )


@pytest.fixture(scope="module")
def finished(tiny_chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoConfig, Any]:
    config = _config(tiny_chat_folder, tmp_path_factory.mktemp("demo") / "run")
    return config, run_demo(config, progress=False)


def test_both_arms_are_whole_runs_of_the_same_prompts_and_settings(finished: tuple[DemoConfig, Any]) -> None:
    folder = finished[0].output / "ppo"
    held = {json.loads(line)["prompt"] for line in (folder.parent / "held_out.jsonl").read_text().splitlines()}
    assert held <= set((folder / "prompts.txt").read_text().splitlines())
    assert len((folder / "prompts.txt").read_text().splitlines()) == 5
    configs = []
    for name in demo_ppo.ARMS:
        assert len(read_metrics(folder / name)) == STEPS
        for file in ("ppo.json", "report.html", "policy"):
            assert (folder / name / file).exists()
        text = (folder / name / "config.yaml").read_text()
        own = ("output:", "source:", "aggregation:")
        configs.append([line for line in text.splitlines() if not line.strip().startswith(own)])
    assert configs[0] == configs[1]


def test_the_arms_start_from_the_same_samples(finished: tuple[DemoConfig, Any]) -> None:
    first = [read_metrics(finished[0].output / "ppo" / name)[0] for name in demo_ppo.ARMS]
    for metric in ("gold/mean", "text/length", "policy/entropy"):
        assert first[0][metric] == first[1][metric]
    assert first[0]["reward/mean"] > first[1]["reward/mean"], "the price is paid"


def test_the_judge_of_the_runs_is_the_judge_of_the_demo(finished: tuple[DemoConfig, Any]) -> None:
    """The mean gold of step 0, at which both policies are still the language model."""
    found = finished[1].metrics["ppo"]
    row = read_metrics(finished[0].output / "ppo" / "single")[0]
    assert row["gold/mean"] == pytest.approx(found["before"], abs=0.3)
    assert found["steps"] == STEPS
    assert found["responses"] == 5 * 3
    for name in demo_ppo.ARMS:
        rows = [json.loads(line) for line in (finished[0].output / "ppo" / name / "judged" / "samples.jsonl").open()]
        assert [len(row["responses"]) for row in rows] == [3] * 5
        arm = found["arms"][name]
        assert arm["gold"] - found["before"] == pytest.approx(arm["change"]["value"])
        assert 0 <= arm["beyond"] <= 1
    arms = found["arms"]
    assert found["difference"]["value"] == pytest.approx(arms["trust"]["gold"] - arms["single"]["gold"])


def test_the_page_and_the_terminal_show_both(finished: tuple[DemoConfig, Any]) -> None:
    config, result = finished
    page = html.unescape((config.output / "report.html").read_text(encoding="utf-8"))
    for line in result.metrics["ppo"]["findings"]:
        assert line in page
    assert "What the policies say" in page
    assert "PPO on the trust region" in page
    text = str(result)
    assert result.metrics["ppo"]["findings"][0] in text
    assert all(cell in text for row in demo_ppo.table_rows(result.metrics["ppo"]) for cell in row)


def test_the_rest_of_the_demo_is_what_it_is_without_ppo(
    tiny_chat_folder: Path, finished: tuple[DemoConfig, Any], tmp_path: Path
) -> None:
    without = run_demo(_config(tiny_chat_folder, tmp_path / "run", steps=0), progress=False)
    assert without.metrics["ppo"] is None
    assert not (tmp_path / "run" / "ppo").exists()
    assert "PPO" not in str(without)
    assert "PPO" not in (tmp_path / "run" / "report.html").read_text().split("All settings")[0]
    own = ("seconds", "ppo", "distances")
    same = [{k: v for k, v in r.metrics.items() if k not in own} for r in (without, finished[1])]
    assert same[0] == same[1]
    assert without.metrics["distances"] == finished[1].metrics["distances"][:-2]
    for name in ("samples.jsonl", "pairs.jsonl", "held_out.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (finished[0].output / name).read_bytes()


def test_interrupted_in_the_second_run_the_demo_goes_on_to_the_same_numbers(
    tiny_chat_folder: Path, finished: tuple[DemoConfig, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tiny_chat_folder, tmp_path / "cut")
    usual, count = loop.update, 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == STEPS + 4:
            raise KeyboardInterrupt
        return usual(*args, **kwargs)

    monkeypatch.setattr(loop, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_demo(config, progress=False)
    assert (config.output / "ppo" / "single" / "ppo.json").exists()
    assert not (config.output / "ppo" / "trust" / "ppo.json").exists()
    result = run_demo(config, progress=False)
    assert count < 2 * STEPS + 4, "what was done was not done again"
    assert result.metrics["ppo"] == finished[1].metrics["ppo"]


def _judged(tmp_path: Path, single: float, trust: float) -> dict[str, Any]:
    """Two policies to 30 prompts whose responses the judge likes by so much more than the language model's."""
    for name in demo_ppo.ARMS:
        with RunLog(tmp_path / "ppo" / name) as log:
            log.metrics(0, {"kl/sequence": 1.5})
    torch.manual_seed(1)
    known = torch.randn(60, 4)
    head = EnsembleHead(4, 1, aggregation="mean")
    head.set_trust(fit_trust(known, directions=0, head=head))
    noise = 0.1 * torch.randn(2, 30, 2)
    rollouts = {
        name: [
            Rollout(f"p{p}", [str(better + float(noise[i, p, j])) for j in range(2)], [True] * 2, torch.randn(2, 4))
            for p in range(30)
        ]
        for i, (name, better) in enumerate({SINGLE: single, TRUST: trust}.items())
    }

    def judge(prompt: str, responses: list[str]) -> list[float]:
        return [float(text) for text in responses]

    own = 0.1 * torch.randn(30, 8, dtype=torch.float64)
    return demo_ppo.as_dict(rollouts, own, judge, Fitted(head, head, {}), tmp_path)


@pytest.mark.parametrize(
    ("single", "trust", "said"),
    [
        (0.0, 0.5, "the policy trained on the trust region has more gold reward than that on the tuned single head (+"),
        (0.5, 0.0, "the policy trained on the trust region has less gold reward than that on the tuned single head (-"),
        (0.5, 0.5, "no difference in gold reward is shown between the policies trained on the trust region and on"),
    ],
)
def test_the_comparison_claims_no_more_than_the_interval_shows(
    tmp_path: Path, single: float, trust: float, said: str
) -> None:
    found = _judged(tmp_path, single, trust)["findings"]
    assert found[0].startswith(f"PPO: {said}")
    assert found[0].endswith("One seed is one observation.")
    assert len(found) == 3


@pytest.mark.parametrize(
    ("change", "said"), [(0.5, "raised"), (-0.5, "lowered"), (0.0, "is not shown to have changed")]
)
def test_each_policy_is_compared_with_the_language_model(tmp_path: Path, change: float, said: str) -> None:
    line = _judged(tmp_path, change, 0.0)["findings"][1]
    assert line.startswith(f"PPO on the tuned single head {said} the gold reward (")
    assert "of its responses lie beyond distance 1" in line
