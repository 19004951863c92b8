"""`prudent train` with an exact stage 1: what the run folder, its models and `prudent eval` say of the penalty."""

from __future__ import annotations

import json
from pathlib import Path

from prudent.rlhf.evaluation.evaluate import EvalConfig, run_eval
from prudent.rlhf.job.config import load_config
from prudent.rlhf.reward.train import TrainConfig, run_train

from ..sentiment import write_pairs


def test_stage_1_solved_exactly_says_how_its_penalty_was_chosen(tiny_chat_folder: Path, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", ("very", "not"))
    sets = ["mode=head", "stage=bt", "eval_fraction=0.25", "bt.solver=newton", "bt.l2=[1e-3, 1e-2, 1e-1]"]
    config = load_config(TrainConfig, None, sets, model=str(tiny_chat_folder), data=str(data), output=tmp_path / "run")
    result = run_train(config, progress=False)
    fit = result.metrics["fit"]
    assert fit["l2"] in [point["l2"] for point in fit["curve"]]
    assert f"single head: L2 {fit['l2']:g} has the least log-loss on held-out prompts" in str(result)
    for folder in ("stage1", "model"):
        assert json.loads((config.output / folder / "fit.json").read_text()) == fit
    assert result.metrics["accuracy"]["single head (stage 1)"]["value"] > 0.8
    assert load_config(TrainConfig, config.output / "config.yaml") == config
    evaluated = run_eval(
        EvalConfig(model=str(config.output / "model"), data=str(data), output=tmp_path / "eval", pictures=False),
        progress=False,
    )
    assert evaluated.metrics["fit"] == fit
    assert "chosen" in str(evaluated)
