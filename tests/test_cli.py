"""The `prudent` command: --help and --keys, errors, and exit codes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from prudent import cli, commands
from prudent.rlhf.job.config import (
    JobConfig,
    config_default,
    config_field,
    config_keys,
    config_template,
    load_config,
)
from prudent.study_commands import STUDIES

EVERY_JOB = commands.JOBS | STUDIES


def prudent(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "prudent.cli", *arguments], input=stdin, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("name", sorted(EVERY_JOB))
def test_help_teaches_by_example_and_key_without_loading_a_model_library(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it now raises
    monkeypatch.setenv("COLUMNS", "400")
    command = ["study", name] if name in STUDIES else [name]
    with pytest.raises(SystemExit) as done:
        cli.main([*command, "--help"])
    assert done.value.code == 0
    shown = capsys.readouterr().out.split("examples:")[1]
    examples, keys = shown.split("keys that people set most, with --set or --config")
    assert f"prudent {' '.join(command)}" in examples
    assert "--set KEY=VALUE" in examples
    assert keys.startswith(f" (`prudent {' '.join(command)} --keys` explains all keys):\n")
    config, job = _config_class(name), EVERY_JOB[name]
    for line, key in zip(keys.splitlines()[1:], job.keys, strict=True):
        left, meaning = re.split(r"  +", line.strip())
        assert left == f"{key}={config_default(config, key)}"
        assert meaning == config_field(config, key).description
    others = set(config_keys(config)) - set(job.flags)
    assert set(job.keys) <= others
    assert len(set(job.keys)) == min(10, len(others))


@pytest.mark.parametrize("name", sorted(EVERY_JOB))
def test_help_of_keys_fits_a_narrow_terminal(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main([*(["study", name] if name in STUDIES else [name]), "--help"])
    lines = capsys.readouterr().out.split(" explains all keys):\n")[1].splitlines()
    keys = [f"  {key}={config_default(_config_class(name), key)}" for key in EVERY_JOB[name].keys]
    assert [line for line in lines if len(line) > 80] == [key for key in keys if len(key) > 80]
    assert len(lines) <= 6 * len(keys)


def test_the_version_is_the_packages() -> None:
    done = prudent("--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "prudent")


@pytest.mark.parametrize("name", sorted(EVERY_JOB))
def test_every_flag_sets_a_key_that_the_jobs_config_has(name: str) -> None:
    job = EVERY_JOB[name]
    assert set(job.flags) <= set(config_keys(_config_class(name)))
    assert callable(getattr(import_module(f"prudent.rlhf.{job.module}"), job.run))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--set", "outptu=x"], "unknown key 'outptu': did you mean 'output'?"),
        (["train", "--model", "m", "--data", "d", "--output", "o", "--set", "brme.num_heads=many"], "brme.num_heads"),
        (["train", "--model", "m"], "data: a value is needed"),
        (["score", "--config", "no_such.yaml"], "config no_such.yaml: cannot be read"),
        (["eval", "--model", "m", "--data", "no_such.jsonl", "--output", "o"], "no_such.jsonl: no such file"),
        (["eval", "--model", "m", "--data", "d", "--output", "o", "--aggregation", "best"], "kind: expected one of"),
    ],
)
def test_a_wrong_argument_is_one_sentence_and_exit_code_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*arguments, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("prudent: error: ")
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["score", "--output", "folder", "--overwrite"], "output: expected a file, got folder, a folder"),
        (["score", "--data", "folder", "--output", "o"], "data: folder: expected a file, got a folder"),
        (
            ["score", "--model", "folder", "--output", "o"],
            "model: expected a reward model's folder or hub name, got the",
        ),
        (["eval", "--model", "folder/nope", "--output", "o"], "model: folder/nope: no such file or folder"),
        (["train", "--output", "file/out"], "output: file/out: Not a directory"),
        (["train", "--model", "folder", "--output", "o"], "model: expected a language model's folder or hub name, got"),
        (["train", "--output", "o", "--data", "no.jsonl"], "data: no.jsonl: no such file"),
    ],
)
def test_a_path_that_cannot_be_used_is_one_sentence_behind_its_key(
    arguments: list[str],
    says: str,
    tiny_chat_folder: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    pair = {"prompt": "the food was", "chosen": "good", "rejected": "bad"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    given = {"--model": str(tiny_chat_folder), "--data": "pairs.jsonl"}
    rest = [part for flag, value in given.items() if flag not in arguments for part in (flag, value)]
    assert cli.main([*arguments, *rest, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(f"prudent: error: {says}")
    assert error.count("prudent: error") == 1


def test_debug_shows_the_traceback_behind_the_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUDENT_DEBUG", "1")
    with pytest.raises(ValueError, match="data: a value is needed"):
        cli.main(["eval", "--model", "m"])


@pytest.mark.parametrize(
    ("command", "again"),
    [
        ("demo", "the same command continues"),
        ("train", "the same command with --resume continues"),
        ("eval", "the same command starts over"),
    ],
)
def test_an_interrupt_says_how_to_go_on_and_exits_130(
    command: str, again: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupted)
    assert cli.main([command]) == 130
    assert again in capsys.readouterr().err


def _config_class(name: str) -> type[JobConfig]:
    job = EVERY_JOB[name]
    found: type[JobConfig] = getattr(import_module(f"prudent.rlhf.{job.module.rpartition('.')[0]}.config"), job.config)
    return found


def _fields(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of a config class, groups included, with its dotted name."""
    for name, field in cls.model_fields.items():
        yield prefix + name, field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{prefix}{name}.")


@pytest.mark.parametrize("name", sorted(EVERY_JOB))
def test_every_key_has_a_description_of_one_sentence(name: str) -> None:
    fields = dict(_fields(_config_class(name)))
    assert len(fields) > 5
    wrong = {
        key: field.description
        for key, field in fields.items()
        # a capital or a number first, a full stop last, and none between two sentences
        if not re.fullmatch(r"[A-Z0-9](?!.*[.!?] +[A-Z])[^\n]*[^.\s]\.", field.description or "")
    }
    assert wrong == {}


@pytest.mark.parametrize("name", sorted(EVERY_JOB))
def test_keys_prints_a_config_file_that_reads_back_to_the_defaults(name: str, tmp_path: Path) -> None:
    cls = _config_class(name)
    required = {key: field.annotation for key, field in cls.model_fields.items() if field.is_required()}
    needed: dict[str, Any] = {
        key: ["given"] if get_origin(kind) is tuple else next(iter(get_args(kind)), "given")
        for key, kind in required.items()
    }
    if name == "ppo":
        needed["reward.source"] = "given"
    (tmp_path / "keys.yaml").write_text(config_template(cls), encoding="utf-8")
    assert load_config(cls, tmp_path / "keys.yaml", **needed) == load_config(cls, **needed)
    values = yaml.safe_load((tmp_path / "keys.yaml").read_text(encoding="utf-8"))
    assert {key for key, value in values.items() if value is None} >= needed.keys() - {"reward.source"}


def test_keys_says_what_each_key_means_and_takes() -> None:
    done = prudent("train", "--keys")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[:2] == [
        "# Trunk, a language model: local folder or hub name.",
        "model:  # needed: a string",
    ]
    assert "aggregation: tradeoff:0.4  # a string" in lines
    assert "mode: auto  # 'auto', 'head', 'lora' or 'full'" in lines
    assert "  num_heads: 5  # a whole number >= 1" in lines
    assert "  max_steps: 2000  # a whole number >= 1 or null" in lines
    assert "  warmup: 0.05  # a number >= 0, < 1" in lines
    assert max(map(len, lines)) <= 120


def test_a_flag_has_its_keys_type_default_and_description(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = cli.build_parser().parse_args(
        ["ppo", "--steps", "3", "--stop-when", "a", "--stop-when", "b", "--reward", "f"]
    )
    values = (arguments.steps, arguments.stop_when, getattr(arguments, "reward.source"), arguments.gold)
    assert values == (3, ["a", "b"], "f", None)
    arguments = cli.build_parser().parse_args(["score", "--skip-bad-rows"])
    assert (arguments.skip_bad_rows, arguments.batch_tokens) == (True, None)
    with pytest.raises(SystemExit):
        cli.main(["ppo", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--steps STEPS Steps of the loop. Default: 100." in shown
    assert "--recipe {ppo,pet}" in shown


def test_a_reader_that_stops_early_is_no_error() -> None:
    done = subprocess.run(
        f"{shlex.quote(sys.executable)} -m prudent.cli ppo --keys | true", shell=True, capture_output=True, text=True
    )
    assert done.stderr == ""


@pytest.mark.slow
def test_train_score_and_eval_follow_each_other_on_a_real_small_model(shared_dir: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    lines = (shared_dir / "data" / "openassistant_en100.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    pairs.write_text("\n".join(lines) + "\n", encoding="utf-8")
    trunk, run = str(shared_dir / "models" / "stories260k"), tmp_path / "run"
    trained = prudent("train", "--model", trunk, "--data", str(pairs), "--output", str(run), "--set", "max_length=128")
    assert trained.returncode == 0, trained.stderr
    assert "single head" in trained.stdout
    again = prudent("train", "--model", trunk, "--data", str(pairs), "--output", str(run), "--set", "max_length=128")
    assert again.returncode == 2
    assert "--resume" in again.stderr

    row = json.dumps({"prompt": "Once upon a time", "response": " there was a dog."})
    scored = prudent("score", "--model", str(run / "model"), "--data", "-", "--output", "-", stdin=row + "\n")
    assert scored.returncode == 0, scored.stderr
    result = json.loads(scored.stdout)
    assert result["prompt"] == "Once upon a time"
    assert len(result["mean"]) == len(result["std"]) == 5
    assert result["worst"] == pytest.approx(min(result["mean"]), abs=1e-5)

    out = tmp_path / "eval"
    judged = prudent(
        "eval", "--model", str(run / "model"), "--data", str(pairs), "--output", str(out), "--set", "max_length=128"
    )
    assert judged.returncode == 0, judged.stderr
    assert "nominal" in judged.stdout
    assert (out / "eval.json").is_file()


def test_bench_says_what_it_has_without_loading_any_of_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prudent.bench", None)
    with pytest.raises(SystemExit) as done:
        cli.main(["bench", "--help"])
    shown = capsys.readouterr().out
    assert done.value.code == 0
    for part in commands.BENCHES:
        assert part in shown


def test_bench_hands_its_flags_to_the_microbenchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--list", "--device", "cpu", "--op", "ensemble_reward", "--size", "smoke"]) == 0
    assert capsys.readouterr().out.startswith("ensemble_reward, forward")


@pytest.mark.parametrize("part", sorted(commands.BENCHES))
def test_each_part_of_bench_has_its_own_help(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["bench", part, "--help"])
    assert done.value.code == 0
    assert part in capsys.readouterr().out


def test_what_bench_refuses_is_one_sentence_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert cli.main(["bench", "--aot"]) == 2
    assert capsys.readouterr().err == "prudent: error: bench --aot: triton is needed: pip install 'prudent[test]'\n"


def test_scores_whose_reader_has_gone_end_in_silence(monkeypatch, tmp_path, capfd):
    from prudent.rlhf.evaluation import score

    def gone(config, **options):
        raise BrokenPipeError(32, "could not be written (Broken pipe)", config.output)

    monkeypatch.setattr(score, "run_score", gone)
    out = os.dup(1)
    try:
        assert cli.main(["score", "--model", "m", "--data", "d", "--output", "-"]) == 0
        assert capfd.readouterr().err == ""
        assert cli.main(["score", "--model", "m", "--data", "d", "--output", str(tmp_path / "s.jsonl")]) == 2
    finally:
        os.dup2(out, 1)
