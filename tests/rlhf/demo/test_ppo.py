"""The demo's PPO runs at a tiny size: equal starts, no effect on the rest of the demo, resuming, and its claims."""

from __future__ import annotations

import html
import json
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vaderSentiment", reason="the gold scorer is an extra: pip install 'prudent[demo]'")
pytest.importorskip("matplotlib", reason="the pictures are an extra: pip install 'prudent[report]'")

from prudent.rlhf.demo import ppo as demo_ppo
from prudent.rlhf.demo.demo import DemoConfig, run_demo
from prudent.rlhf.job.log import read_metrics
from prudent.rlhf.ppo import loop

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
        pairs_per_prompt=4,
        max_new_tokens=6,
        dtype="float32",
        batch_rows=24,
        bt={"epochs": 2},
        brme={"epochs": 2, "max_steps": 20},
        ppo={"steps": steps, "max_new_tokens": 5, "lora_rank": 2, "lr": 1e-2},
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
    assert first[0]["reward/mean"] != first[1]["reward/mean"]


def test_metrics_hold_what_the_runs_measured(finished: tuple[DemoConfig, Any]) -> None:
    found = finished[1].metrics["ppo"]
    assert (found["steps"], found["samples"]) == (STEPS, 5 * 4)
    for name, arm in found["arms"].items():
        rows = read_metrics(finished[0].output / "ppo" / name)
        for key, metric in demo_ppo.SHOWN.items():
            if arm[key] is not None:
                values = [row[metric] for row in rows]
                assert arm[key]["start"] == pytest.approx(sum(values[:3]) / 3)
                assert arm[key]["end"] == pytest.approx(sum(values[-4:]) / 4)
        assert arm["gold"] is not None
        assert arm["kl"] is not None


def test_the_page_and_the_terminal_show_both(finished: tuple[DemoConfig, Any]) -> None:
    config, result = finished
    page = html.unescape((config.output / "report.html").read_text(encoding="utf-8"))
    for line in result.metrics["ppo"]["findings"]:
        assert line in page
    assert "What the policies say" in page
    text = str(result)
    assert "proxy" in text
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
    own = ("seconds", "ppo")
    same = [{k: v for k, v in r.metrics.items() if k not in own} for r in (without, finished[1])]
    assert same[0] == same[1]
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
    assert not (config.output / "ppo" / "ensemble" / "ppo.json").exists()
    result = run_demo(config, progress=False)
    assert count < 2 * STEPS + 4, "what was done was not done again"
    assert result.metrics["ppo"] == finished[1].metrics["ppo"]


def _rows(end: float, seed: int) -> list[dict[str, float]]:
    draw = random.Random(seed)
    noisy = [(step, step / 11) for step in range(12)]
    return [
        {
            "step": step,
            "reward/mean": x + draw.gauss(0, 0.05),
            "gold/mean": end * x + draw.gauss(0, 0.05),
            "kl/sequence": 9 * x,
            "text/length": 20.0,
        }
        for step, x in noisy
    ]


@pytest.mark.parametrize(
    ("single", "ensemble", "said"),
    [
        (0.0, 1.0, "the policy trained on tradeoff λ=0.4 ends with more gold reward"),
        (1.0, 0.0, "the policy trained on tradeoff λ=0.4 ends with less gold reward"),
        (1.0, 1.0, "no difference in gold reward is shown"),
    ],
)
def test_the_comparison_claims_no_more_than_the_interval_shows(single: float, ensemble: float, said: str) -> None:
    found = demo_ppo.as_dict({"single": _rows(single, 1), "ensemble": _rows(ensemble, 2)})["findings"]
    assert said in found[0]
    assert "One seed is one observation." in found[0]
    assert found[1].startswith("Single head: ")
    assert found[2].startswith("Tradeoff λ=0.4: ")


def test_too_few_steps_tell_nothing() -> None:
    rows = {name: _rows(1.0, 1)[:5] for name in demo_ppo.ARMS}
    assert "too few steps" in demo_ppo.as_dict(rows)["findings"][0]
