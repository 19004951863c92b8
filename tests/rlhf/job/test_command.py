"""`command_of`: a config as the command that makes it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from prudent.rlhf.job.command import command_of
from prudent.rlhf.job.config import load_config
from prudent.rlhf.reward.config import TrainConfig

FLAGS = ("model", "data", "output", "stage")
NEEDED = {"model": "org/model", "data": "pairs.jsonl", "output": Path("runs/my run")}


def parsed(command: str) -> TrainConfig:
    """The config that a shell and `prudent train` would make of the command."""
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["prudent", "train"]
    options = list(zip(words[2::2], words[3::2], strict=True))
    sets = [value for name, value in options if name == "--set"]
    flags: dict[str, Any] = {name[2:].replace("-", "_"): value for name, value in options if name != "--set"}
    return load_config(TrainConfig, None, sets, **flags)


def test_defaults_are_left_out_and_a_key_without_a_flag_is_set() -> None:
    config = load_config(TrainConfig, None, ["brme.num_heads=3"], **NEEDED)
    assert command_of("train", config, FLAGS) == (
        "prudent train \\\n    --model org/model \\\n    --data pairs.jsonl \\\n    --output 'runs/my run' \\\n"
        "    --set brme.num_heads=3"
    )


@pytest.mark.parametrize(
    "entry",
    [
        "features=[last:-1, mean:20]",
        "aggregation=lcb:1,trust=1",
        "bt.l2=[0.003, 1e-5]",
        "trunk.lr=1e-5",
        "skip_bad_rows=true",
        "stage1=it's here",
        "stage1='3'",
        "stage1='null'",
        "bt.bsr=0.001",
    ],
)
def test_the_command_makes_an_equal_config(entry: str) -> None:
    config = load_config(TrainConfig, None, [entry], **NEEDED, stage="bt")
    assert config != load_config(TrainConfig, None, **NEEDED, stage="bt")
    assert parsed(command_of("train", config, FLAGS)) == config
