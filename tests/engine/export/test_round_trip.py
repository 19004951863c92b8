"""Exported folders, loaded in a process without prudent, give the rewards of `Scorer`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from prudent.engine import EnsembleRewardModel, Scorer, fit_trust
from prudent.engine.export import Form, Prepared, prepare

pytestmark = pytest.mark.slow

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
LONG = "abcdefghijklmnopqrst" * 3
ITEMS = ["one", "a longer text", CHAT, {"prompt": "q", "response": "cut of", "complete": False}]


@dataclass(frozen=True)
class Case:
    """A model, a form, and what the tokeniser and the trunk are."""

    form: Form
    family: str = "llama"
    aggregation: str = "tradeoff:0.4,nominal=relative_std"
    dtype: torch.dtype = torch.float32
    pad: str = "<pad>"
    shards: str = "5GB"
    rows: int = 300
    options: dict[str, Any] = field(default_factory=dict)


FAMILIES = ("llama", "qwen2", "gpt_neox", "gemma2", "gpt2")
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
LOGPROB = ["last:-1", "mean:1", "logprob"]
POOLER = {"pooling": "pooler"}
CASES = {
    **{f"{form}-{family}": Case(form, family, "mean" if form == "linear" else Case.aggregation)
       for form in ("stock", "linear", "remote-code") for family in FAMILIES},
    **{f"{form}-{name}": Case(form, aggregation="head:1" if form == "linear" else "lcb:0.5", dtype=dtype)
       for form in ("stock", "linear", "remote-code") for name, dtype in HALF.items()},
    **{f"remote-code-{family}": Case("remote-code", family) for family in ("bert", "roberta", "deberta", "modernbert")},
    **{f"{form}-bert-pooler": Case(form, "bert", "mean" if form == "linear" else "min", options=POOLER)
       for form in ("stock", "linear", "remote-code")},
    "stock-priced": Case("stock", aggregation="trust:0.7,from=0.2,power=3"),
    "remote-code-priced": Case("remote-code", aggregation="uwo:0.5,trust=2"),
    "stock-eos-pads": Case("stock", pad="</s>"),
    "linear-eos-pads-full-vocabulary": Case("linear", aggregation="mean", pad="</s>", rows=260),
    "linear-eos-pads": Case("linear", aggregation="nominal,nominal=head:2", pad="</s>"),
    "stock-skips": Case("stock", options={"skip_token_id": 2}),
    "linear-sharded": Case("linear", aggregation="mean", shards="20KB"),
    "remote-code-sharded": Case("remote-code", shards="20KB"),
    "remote-code-skips": Case("remote-code", options={"skip_token_id": 2}),
    "remote-code-wide": Case("remote-code", options={"taps": "wide"}),
    "remote-code-logprob": Case("remote-code", "gemma2", options={"taps": LOGPROB, "logprob_skips": [1, 2]}),
    "remote-code-logprob-scaled": Case("remote-code", "cohere", options={"taps": LOGPROB, "logprob_skips": [1, 2]}),
    "remote-code-logprob-untied": Case("remote-code", options={"taps": ["logprob", "last:1"]}),
    "remote-code-wide-encoder": Case("remote-code", "bert", options={"taps": ["last:-1", "mean:1"]}),
    "remote-code-wide-bf16": Case("remote-code", "qwen2", dtype=torch.bfloat16, options={"taps": ["mean:1", "last:0"]}),
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """The model and its tokeniser, what was prepared and where it was written, and what the other process found."""

    case: Case
    scorer: Scorer
    tokenizer: Any
    prepared: Prepared
    folder: Path
    found: dict[str, Any]


def model_of(case: Case, tiny_config: Any) -> EnsembleRewardModel:
    torch.manual_seed(0)
    lm = "logprob" in case.options.get("taps", ())
    build = transformers.AutoModelForCausalLM if lm else transformers.AutoModel
    trunk = build.from_config(tiny_config(case.family, vocab_size=case.rows))
    with torch.no_grad():
        for parameter in trunk.parameters():  # initial weights are so small that many a wrong reward would look right
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    model = EnsembleRewardModel.from_trunk(
        trunk.to(case.dtype), num_heads=3, std_floor=0.01, max_score_length=24, **case.options
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in {**dict(model.score.named_parameters()), **dict(model.score.named_buffers())}.items():
            spread = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(spread * 0.3 if name in ("weight", "bias", "shift") else spread.abs() + 0.5)
    model.score.aggregation = "mean"
    model.score.set_trust(fit_trust(torch.randn(60, model.score.hidden_size, generator=generator), directions=4))
    model.score.aggregation = case.aggregation
    return model.eval()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, tiny_config: Any, make_tokenizer: Any) -> dict[str, Outcome]:
    """Every case, written here and loaded in one other process, whose start is most of the time."""
    root = tmp_path_factory.mktemp("exported")
    asked, known = [], []
    for name, case in CASES.items():
        model, tokenizer = model_of(case, tiny_config), make_tokenizer(chat=True, pad_token=case.pad)
        prepared, scorer = prepare(model, tokenizer, case.form), Scorer(model, tokenizer, progress=False)
        (root / name).mkdir()
        prepared.write(root / name, case.shards)
        read = [scorer.read(item) for item in ITEMS]
        asked.append(
            {
                "folder": str(root / name),
                "form": case.form,
                "rows": [item.ids for item in read],
                "starts": [item.start for item in read] if model.config.reads_response else None,
                "chat": CHAT,
                "text": LONG + "</s>" * model.config.append_eos,
                "constant": prepared.constant,
                "sides": ["right", "left"] if case.form == "remote-code" else ["right"],
            }
        )
        known.append((case, scorer, tokenizer, prepared, root / name))
    (root / "cases.json").write_text(json.dumps(asked))
    script = Path(__file__).with_name("foreign.py")
    subprocess.run(
        [sys.executable, str(script), str(root / "cases.json"), str(root / "found.json")],
        env={**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=root,
        check=True,
        timeout=600,
    )
    found = json.loads((root / "found.json").read_text())
    return {name: Outcome(*parts, answer) for name, parts, answer in zip(CASES, known, found, strict=True)}


def close(found: Any, wanted: Any, dtype: torch.dtype) -> None:
    """Equal to the rounding of the trunk's dtype, of numbers of about 1 that sum 32 products."""
    tolerance = 1e-5 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        torch.tensor(found).double(), torch.as_tensor(wanted).double(), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("name", CASES)
def test_the_rewards_are_those_of_scorer(outcomes: dict[str, Outcome], name: str) -> None:
    outcome = outcomes[name]
    scores = outcome.scorer.score(ITEMS)
    assert len({round(reward, 3) for reward in scores.reward if reward is not None}) == len(ITEMS)
    for side in outcome.found.keys() & {"left", "right"}:
        close(outcome.found[side]["reward"], scores.reward, outcome.case.dtype)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("linear")])
def test_the_means_stds_and_distances_are_those_of_scorer(outcomes: dict[str, Outcome], name: str) -> None:
    outcome = outcomes[name]
    scores = outcome.scorer.score(ITEMS)
    for side in outcome.found.keys() & {"left", "right"}:
        found = outcome.found[side]
        close(found["mean"], scores.mean, outcome.case.dtype)
        close(found["std"], scores.std, outcome.case.dtype)
        if name in ("stock-bert-pooler", "stock-skips"):  # the script knows their features only of decoders, at the end
            continue
        close(found["distance"], scores.distance, outcome.case.dtype)


@pytest.mark.parametrize("name", CASES)
def test_the_trunks_dtype_and_the_tokenisers_texts_are_kept(outcomes: dict[str, Outcome], name: str) -> None:
    outcome, found = outcomes[name], outcomes[name].found
    assert found["dtype"] == str(outcome.case.dtype)
    assert found["chat"] == outcome.tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert found["text"] == outcome.scorer.encode(LONG)
    assert len(found["text"]) == 24


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("remote")])
def test_the_config_says_how_texts_are_read(outcomes: dict[str, Outcome], name: str) -> None:
    config, reward = outcomes[name].found["config"], outcomes[name].scorer.model
    assert config["prudent"]["append_eos"] == reward.config.append_eos
    assert config["prudent"]["max_score_length"] == 24
    assert config["prudent"]["aggregation"] == str(reward.score.aggregation)
    assert config["problem_type"] == "regression"
    assert len(config["id2label"]) == (1 if name.startswith("linear") else 6)
