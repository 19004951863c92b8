"""TRL takes an exported folder by its path, where prudent is not installed, and trains on the rewards of `Scorer`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from prudent.engine import EnsembleRewardModel, Scorer
from prudent.engine.export import prepare

pytest.importorskip("trl")
pytest.importorskip("datasets")


@pytest.mark.slow
def test_one_grpo_step_on_the_path_of_an_export(tiny_config: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    policy = tmp_path / "policy"
    transformers.AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(policy)
    tokenizer = make_tokenizer(chat=True, pad_token="</s>")
    tokenizer.save_pretrained(policy)
    reward = EnsembleRewardModel.from_trunk(str(policy), num_heads=3)
    with torch.no_grad():
        reward.score.weight *= 20
        reward.score.shift.fill_(0.5)
    aggregations = {"linear": "mean", "remote-code": "lcb:1"}
    prepared = {}
    for form, aggregation in aggregations.items():
        (tmp_path / form).mkdir()
        prepared[form] = prepare(reward, tokenizer, form, aggregation)  # type: ignore[arg-type]
        prepared[form].write(tmp_path / form)
    script, found = Path(__file__).with_name("foreign_trl.py"), tmp_path / "found.json"
    subprocess.run(
        [sys.executable, str(script), str(policy), str(found), *(str(tmp_path / form) for form in aggregations)],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        check=True,
        timeout=300,
    )
    results = json.loads(found.read_text())
    assert len(results) == len(aggregations)
    for (form, aggregation), result in zip(aggregations.items(), results, strict=True):
        wanted = Scorer(reward, tokenizer, progress=False).score(result["rows"], aggregation=aggregation).reward
        assert len({len(row) for row in result["rows"]}) > 1  # some are padded
        got = [logit + prepared[form].constant for logit in result["logits"]]
        assert got == pytest.approx(wanted, abs=1e-5)
