"""The GPU measurement: its goals read what its parts write, and a dry run on a CPU reports no GPU numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prudent.bench import ppo_gpu
from prudent.bench.gpu_goals import verdicts


def test_each_goal_is_held_to_its_parts_number() -> None:
    rows = [
        {"name": "8b", "peak_gb": 41.0, "step_over_read": 2.4, "update_share": 0.35, "planned_over_measured": 1.05},
        {"name": "trl", "faster": 1.9, "less_memory": None},
    ]
    found = [(v["measured"], v["verdict"]) for v in verdicts(rows, ppo_gpu.GOALS)]
    assert found == [
        ("41", "does not hold"), ("not measured", "not measured"), ("2.40x", "holds"), ("35.0 %", "holds"),
        ("1.90x", "does not hold"), ("not measured", "not measured"), ("1.05x", "holds"), ("1.05x", "holds"),
    ]  # fmt: skip


def test_weights_that_are_looked_up_are_not_multiplied() -> None:
    from prudent.bench.ppo_sides import OurLoop, Sides
    from prudent.bench.ppo_trl import SMALL

    for tied in (False, True):
        fields = {**SMALL, "tie_word_embeddings": tied}
        loop = OurLoop(Sides(shape=tuple(fields.items()), prompts=2))
        trunk, head = ppo_gpu._multiplied(loop)
        frozen = sum(p.numel() for p in loop.policy.model.parameters() if not p.requires_grad)
        assert head == 512 * 64
        assert trunk == frozen - (1 if tied else 2) * 512 * 64


@pytest.mark.slow
def test_a_dry_run_goes_through_and_claims_nothing(tmp_path: Path) -> None:
    assert ppo_gpu.main(["--dry", "--parts", "8b", "14b", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "ppo_gpu.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["8b", "14b"]
    assert report["rows"][0]["seconds"].keys() == {"rollout", "scoring", "update", "token"}
    assert {goal["verdict"] for goal in report["goals"]} == {"not measured"}
    assert "nothing here is a GPU's number" in (tmp_path / "ppo_gpu.md").read_text()


@pytest.mark.slow
def test_a_part_that_fails_does_not_hide_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the installed TRL has no PPO any more
    monkeypatch.setattr(ppo_gpu, "compare", lambda *a, **k: {"ours": {}, "trl": {"error": "no PPO"}, "seconds": {}})
    assert ppo_gpu.main(["--dry", "--parts", "trl", "8b", "--out", str(tmp_path)]) == 1
    assert "| trl | tiny |  | trl: no PPO |" in (tmp_path / "ppo_gpu.md").read_text()
    assert len(json.loads((tmp_path / "ppo_gpu.json").read_text())["rows"]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_names_the_dry_run() -> None:
    with pytest.raises(SystemExit, match="no CUDA device here; --dry runs the same on a CPU"):
        ppo_gpu.main([])
