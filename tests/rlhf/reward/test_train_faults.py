"""`prudent train` on a full disk, in a folder with incomplete files, and beside another process."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from prudent.rlhf.job.config import load_config
from prudent.rlhf.job.folder import locked_folder
from prudent.rlhf.reward.train import TrainConfig, run_train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {"prompt": f"the {thing} was", "chosen": good, "rejected": bad}
        for thing in ("day", "food", "hotel", "train")
        for good, bad in (("good", "bad"), ("great", "awful"))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _config(model: Path, data: Path, output: Path, mode: str) -> TrainConfig:
    sets = (
        ["bt.solver=adamw", "bt.epochs=2", "brme.epochs=2"]
        if mode == "head"
        else ["trunk.max_steps=2", "trunk.lora_rank=2"]
    )
    sets += ["brme.num_heads=2", "eval_fraction=0.0", f"mode={mode}"]
    return load_config(TrainConfig, None, sets, model=str(model), data=str(data), output=output)


@pytest.fixture(scope="module", params=["head", "lora"])
def finished(
    request: pytest.FixtureRequest, tiny_chat_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> TrainConfig:
    if request.param == "lora":
        pytest.importorskip("peft")
    config = _config(tiny_chat_folder, data, tmp_path_factory.mktemp("runs") / "run", request.param)
    run_train(config, progress=False)
    return config


def _copy(run: TrainConfig, output: Path) -> TrainConfig:
    """The same run as one killed before its last file was written."""
    shutil.copytree(run.output, output)
    (output / "train.json").unlink()
    return run.model_copy(update={"output": output})


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def test_files_of_the_models_are_as_readable_as_the_others(finished: TrainConfig) -> None:
    weights = list(finished.output.glob("*/*.safetensors"))
    assert len(weights) >= 2
    mode = (finished.output / "config.yaml").stat().st_mode
    for file in weights:
        assert file.stat().st_mode == mode, file


@pytest.mark.parametrize("name", ["data.json", "metrics.jsonl"])
def test_a_resumed_run_names_the_file_that_is_broken(finished: TrainConfig, tmp_path: Path, name: str) -> None:
    config = _copy(finished, tmp_path / "run")
    (config.output / name).write_text("{broken\n")
    with pytest.raises(ValueError, match=rf"run/{name}(, line 1)?: expected a JSON object, got broken JSON"):
        run_train(config, resume=True, progress=False)


@pytest.mark.parametrize("finished", ["head"], indirect=True)
def test_a_cut_checkpoint_of_the_heads_begins_its_stage_anew(
    finished: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = _copy(finished, tmp_path / "run")
    shutil.rmtree(config.output / "model")
    _cut(config.output / "checkpoints" / "brme.pt")
    with caplog.at_level(logging.WARNING):
        run_train(config, resume=True, progress=False)
    assert "checkpoints/brme.pt: its weights cannot be read (" in caplog.text
    assert (config.output / "train.json").read_text() == (finished.output / "train.json").read_text()


@pytest.mark.parametrize("finished", ["lora"], indirect=True)
def test_a_finished_stages_model_that_was_cut_is_named(finished: TrainConfig, tmp_path: Path) -> None:
    config = _copy(finished, tmp_path / "run")
    _cut(config.output / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=r"output: .*/run/model: its weights cannot be read \("):
        run_train(config, resume=True, progress=False)


def test_one_process_trains_in_a_folder(tiny_chat_folder: Path, data: Path, tmp_path: Path) -> None:
    config = _config(tiny_chat_folder, data, tmp_path / "run", "head")
    with locked_folder(config.output), pytest.raises(ValueError, match=r"output: .* is being written by process"):
        run_train(config, progress=False)
    run_train(config, progress=False)


def _train_with_little_room(config: TrainConfig, room: int, said: Any) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        run_train(config, progress=False)
    except OSError as error:
        said.send((error.filename, error.strerror))
    except BaseException as error:
        said.send((type(error).__name__, str(error)))


@pytest.mark.parametrize(
    ("mode", "room", "where"),
    [
        ("head", 200, r"run/(metrics\.jsonl|config\.yaml)"),
        ("head", 2_000, r"run/features/\w+/\w+\.safetensors"),
        ("head", 20_000, r"run/stage1"),
        ("lora", 20_000, r"run/checkpoints/bt(/.*)?"),
    ],
)
def test_a_full_disk_is_said_with_the_file_that_was_being_written(
    tiny_chat_folder: Path, data: Path, tmp_path: Path, mode: str, room: int, where: str
) -> None:
    if mode == "lora":
        pytest.importorskip("peft")
    receive, send = multiprocessing.Pipe(duplex=False)
    config = _config(tiny_chat_folder, data, tmp_path / "run", mode)
    child = multiprocessing.get_context("fork").Process(target=_train_with_little_room, args=(config, room, send))
    child.start()
    assert receive.poll(120)
    file, words = receive.recv()
    child.join()
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}/{where}", str(file)), (file, words)
    assert re.search(r"File too large|is the disk full\?", words)
    assert os.strerror(27) == "File too large"


@pytest.mark.parametrize("mode", ["head", "full"])
def test_messages_for_a_model_without_a_chat_template_are_refused_by_line(
    tiny_chat_folder: Path, tmp_path: Path, mode: str
) -> None:
    shutil.copytree(tiny_chat_folder, tmp_path / "plain")
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_folder)
    tokenizer.chat_template = None
    (tmp_path / "plain" / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(tmp_path / "plain")
    rows = [
        {"prompt": [{"role": "user", "content": f"day {i}"}], "chosen": "good", "rejected": "bad"} for i in range(4)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = load_config(
        TrainConfig,
        None,
        [f"mode={mode}", "eval_fraction=0", "brme.num_heads=2"],
        model=str(tmp_path / "plain"),
        data=str(tmp_path / "pairs.jsonl"),
        output=tmp_path / "run",
    )
    with pytest.raises(
        ValueError, match=r"pairs\.jsonl, line 1, chosen: expected plain text, .*: give plain texts, or"
    ):
        run_train(config, progress=False)
