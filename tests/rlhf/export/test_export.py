"""`prudent export` as a command: its folders, their cards, its refusals, and what a kill leaves."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from prudent import cli
from prudent.engine import EnsembleRewardModel, Scorer
from prudent.rlhf.evaluation.evaluate import EvalConfig, run_eval
from prudent.rlhf.export import export, loading_text
from prudent.rlhf.export.export import ExportConfig, run_export
from prudent.rlhf.job.config import load_config
from prudent.rlhf.report.card import is_untouched, parts_of
from prudent.rlhf.reward.train import TrainConfig, run_train

from ..sentiment import write_pairs

pytestmark = pytest.mark.slow

CHAT = {"prompt": "How was it?", "response": "Lovely."}
PLAIN = "How was it? Lovely."
NAMES = ("stock", "linear", "remote-code", "default", "plain")
HEADINGS = [
    "How to load it", "What this folder carries", "Reward", "What a reward's size means", "std", "Distance",
    "How it was made", "Held-out numbers", "Licence",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny_chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """lora: a merged LoRA whose heads read the last state, with an evaluation; head: the default features; plain: lora
    without a chat template."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_pairs(folder / "pairs.jsonl", ("very", "not"))
    for mode, sets in {
        "lora": ["features=last", "trunk.max_steps=2", "trunk.batch_size=8"],
        "head": ["brme.epochs=2"],
    }.items():
        given = [f"mode={mode}", "eval_fraction=0.25", "brme.num_heads=3", *sets]
        run_train(
            load_config(
                TrainConfig, None, given, model=str(tiny_chat_folder), data=str(data), output=folder / mode, seed=1
            ),
            progress=False,
        )
    shutil.copytree(folder / "lora", folder / "plain")
    (folder / "plain" / "model" / "chat_template.jinja").unlink()
    output, model = folder / "lora" / "eval", str(folder / "lora")
    run_eval(EvalConfig(model=model, data=str(data), output=output, pictures=False, eval_fraction=0.25), progress=False)
    return {name: folder / name for name in ("lora", "head", "plain")}


@pytest.fixture(scope="module")
def exported(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    for name, run, form, more in (
        ("stock", "lora", "stock", ["--aggregation", "lcb:0.5"]),
        ("linear", "lora", "linear", ["--aggregation", "mean"]),
        ("remote-code", "lora", "remote-code", []),
        ("default", "head", "remote-code", []),
        ("plain", "plain", "stock", []),
    ):
        arguments = ["--model", str(runs[run]), "--to", str(folder / name), "--as", form, *more, "--quiet"]
        assert cli.main(["export", *arguments]) == 0
    return {name: folder / name for name in NAMES}


def scorer(run: Path) -> Scorer:
    folder = run / "model"
    return Scorer(EnsembleRewardModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), progress=False)


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def numbers_in(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", text)]


def test_the_code_on_each_card_prints_the_models_reward_where_prudent_is_not_installed(
    runs: dict[str, Path], exported: dict[str, Path], tmp_path: Path
) -> None:
    script = Path(__file__).with_name("run_cards.py")
    done = subprocess.run(
        [sys.executable, str(script), *map(str, exported.values())],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    printed = dict(zip(exported, json.loads(done.stdout), strict=True))
    for name, aggregation in {"stock": "lcb:0.5", "linear": "mean"}.items() | dict.fromkeys(NAMES[2:]).items():
        run = {"default": "head", "plain": "plain"}.get(name, "lora")
        item = PLAIN if name == "plain" else CHAT
        scores = scorer(runs[run]).score([item], aggregation=aggregation)
        wanted = [scores.reward[0]]
        if name != "linear":
            assert scores.distance is not None
            wanted += [*scores.std[0].tolist(), float(scores.distance[0])]
        # torch prints four decimals
        assert numbers_in(printed[name]) == pytest.approx(wanted, abs=1e-4, rel=1e-3), name


@pytest.mark.parametrize("name", NAMES)
def test_a_card_has_every_section_and_says_where_to_load_it(exported: dict[str, Path], name: str) -> None:
    text = card_of(exported[name])
    metadata, heading, sections = parts_of(text)
    assert is_untouched(text)
    assert [*sections][: len(HEADINGS)] == HEADINGS
    assert heading.startswith("A reward model with 3 heads on")
    assert metadata["library_name"] == "transformers"
    for place in ("transformers", "TRL", "vLLM", "OpenRLHF and verl", "prudent"):
        assert f"**{place}" in sections["How to load it"]
    assert "pairs trained on, 18 pairs of 3 prompts held out" in sections["How it was made"]
    assert "--as " in sections["How it was made"]
    assert "| accuracy, % |" in sections["Held-out numbers"]
    assert "that end with `<|end|>` if they are complete: add it" in sections["How to load it"]
    assert ("eq. 8" in sections["std"]) is (name != "linear")


def test_the_stock_card_says_that_a_priced_reward_pays_for_the_distance(runs: dict[str, Path], tmp_path: Path) -> None:
    plain = ["export", "--model", str(runs["lora"]), "--as", "stock", "--quiet"]
    for name, more, says in (
        ("none", [], "does not pay"),
        ("price", ["--aggregation", "lcb:1,trust=1"], "pays for it"),
    ):
        assert cli.main([*plain, "--to", str(tmp_path / name), *more]) == 0
        assert f"**The reward** {says}" in parts_of(card_of(tmp_path / name))[2]["Distance"]


def test_no_file_names_the_folder_that_the_trunk_came_from(exported: dict[str, Path], tiny_chat_folder: Path) -> None:
    for folder in exported.values():
        assert str(tiny_chat_folder) not in (folder / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("prompt", "response"),
    [("How was it? ", "Lovely."), ("Once upon a ti", "me there was"), ("a very long prompt " * 400, "Lovely.")],
    ids=["blank", "word", "long"],
)
def test_the_cards_begin_finds_the_place_that_prudent_finds(exported, runs, prompt: str, response: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported["default"])
    tokenizer.chat_template = None
    model = EnsembleRewardModel.from_pretrained(runs["head"] / "model")
    scorer = Scorer(model, tokenizer, max_length=tokenizer.model_max_length, progress=False)
    names: dict[str, Any] = {"tokenizer": tokenizer}
    exec(loading_text._BEGIN, names)
    read = scorer.read({"prompt": prompt, "response": response})
    assert names["begin"](prompt + response + tokenizer.eos_token, prompt) == read.start


def test_the_card_has_what_prudent_eval_measured(runs: dict[str, Path], exported: dict[str, Path]) -> None:
    found = json.loads((runs["lora"] / "eval" / "eval.json").read_text())
    numbers = parts_of(card_of(exported["stock"]))[2]["Held-out numbers"]
    assert f"Accuracy on {found['pairs']} pairs of {found['prompts']} prompts of" in numbers
    assert f"| {100 * found['accuracy']['mean']['value']:.1f} |" in numbers.partition("by `prudent eval`")[2]
    assert "prudent eval" not in parts_of(card_of(exported["default"]))[2]["Held-out numbers"]


def test_a_linear_reward_states_its_constant_and_its_end_of_texts(runs, exported) -> None:
    config = json.loads((exported["linear"] / "config.json").read_text())
    constant = config["prudent"]["constant"]
    assert constant != 0
    assert f"plus {constant!r}" in parts_of(card_of(exported["linear"]))[2]["What this folder carries"]
    assert config["prudent"]["append_eos"] is scorer(runs["lora"]).model.config.append_eos
    assert config["num_labels"] == 1 if "num_labels" in config else len(config["id2label"]) == 1


def test_what_a_person_wrote_on_the_models_card_stays(runs: dict[str, Path], tmp_path: Path) -> None:
    card = runs["lora"] / "model" / "README.md"
    before = card.read_text(encoding="utf-8")
    edited = before.replace("---\n", "---\nlicense: mit\n", 1).partition("<!--")[0] + "\n## Mine\n\nKept.\n"
    card.write_text(edited, encoding="utf-8")
    try:
        run_export(ExportConfig(model=str(runs["lora"]), to=tmp_path / "new", as_="remote-code"), progress=False)
    finally:
        card.write_text(before, encoding="utf-8")
    metadata, _, sections = parts_of(card_of(tmp_path / "new"))
    assert yaml.safe_load(edited.split("---\n")[1])["license"] == metadata["license"] == "mit"
    assert sections["Mine"] == "Kept."


@pytest.fixture
def classifier(tiny_chat_folder: Path, tmp_path: Path) -> Path:
    """Somebody's one-head reward model, with a card of their own."""
    torch.manual_seed(2)
    config = LlamaConfig.from_pretrained(tiny_chat_folder, num_labels=1, pad_token_id=0)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(tiny_chat_folder).save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "README.md").write_text(
        "---\nlicense: mit\n---\n# Theirs\n\n## How it was made\n\nSecret.\n"
    )
    return tmp_path / "theirs"


def test_a_foreign_reward_model_gets_the_code_and_nothing_is_made_up(classifier: Path, tmp_path: Path) -> None:
    given = ExportConfig(model=str(classifier), to=tmp_path / "new", as_="remote-code", append_eos=False)
    assert "without an end-of-sequence token" in str(run_export(given, progress=False))
    metadata, _, sections = parts_of(card_of(tmp_path / "new"))
    assert "Not known to `prudent export`" in sections["How it was made"]
    assert "Secret" not in sections["How it was made"]
    assert sections["Distance"].startswith("None")
    assert metadata["license"] == "mit"
    assert json.loads((tmp_path / "new" / "config.json").read_text())["append_eos"] is False


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--to", "old", "--as", "linear"], "to: expected a new folder, got old, which exists"),
        (["--to", "new", "--as", "linear"], "aggregation: expected one that is a weighted sum of the heads' means"),
        (["--to", "new", "--as", "stock", "--aggregation", "batch_worst"], "scores each response by itself"),
        (["--to", "new", "--as", "stock", "--aggregation", "head:3"], "expected a head below 3"),
        (["--to", "new", "--as", "gguf"], "as_: expected 'stock', 'linear' or 'remote-code', got"),
        (["--to", "new"], "as_: a value is needed"),
        (["--to", "new", "--as", "stock", "--set", "max_shard_size=big"], "max_shard_size: expected a size such as"),
    ],
)
def test_what_is_refused_is_one_sentence_before_the_weights_are_read(
    runs: dict[str, Path], arguments: list[str], says: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    monkeypatch.setattr(export, "load_reward", None)
    assert cli.main(["export", "--model", str(runs["lora"]), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("prudent: error: ")
    assert says in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == ["old"]


def test_default_features_are_refused_by_the_forms_that_lack_them(runs, tmp_path, capsys) -> None:
    arguments = ["--model", str(runs["head"]), "--to", str(tmp_path / "new"), "--as", "stock"]
    assert cli.main(["export", *arguments]) == 2
    assert "as: expected remote-code, because the heads read" in capsys.readouterr().err


def test_a_full_disk_leaves_no_folder(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export, "write_card", full)
    with pytest.raises(OSError, match="could not be written") as error:
        run_export(ExportConfig(model=str(runs["lora"]), to=tmp_path / "new", as_="remote-code"), progress=False)
    assert error.value.filename == str(tmp_path / "new")
    assert os.listdir(tmp_path) == []


def test_a_kill_leaves_no_half_a_folder_and_the_same_command_then_works(
    runs: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    arguments = ["export", "--model", str(runs["lora"]), "--to", str(tmp_path / "new"), "--as", "remote-code"]
    killed = (
        "import os, sys; from prudent import cli; from prudent.rlhf.export import export\n"
        "export.write_card = lambda *_: os.kill(os.getpid(), 9)\n"
        "cli.main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", killed, *arguments], capture_output=True, timeout=300)
    assert done.returncode == -9
    assert not (tmp_path / "new").exists()
    assert cli.main([*arguments, "--quiet"]) == 0
    assert "EnsembleRewardModel (remote-code), aggregation tradeoff:0.4" in capsys.readouterr().out
    assert (tmp_path / "new" / "modeling_prudent.py").is_file()
