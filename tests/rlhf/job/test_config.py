"""A config from YAML, --set and arguments: what overrides what, how mistakes are named, how keys are explained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, field_validator

from prudent.rlhf.job.config import JobConfig, config_default, config_field, config_keys, config_template, load_config


class Inner(JobConfig):
    lr: float = 0.1
    epochs: int = 3
    noise: Literal["closed", "sampled"] = "closed"
    rows: Annotated[int, Field(ge=1)] | Literal["auto", "all"] = Field(default="auto", description="Rows of it.")
    name: str | None = None

    @field_validator("name")
    @classmethod
    def _no_shouting(cls, value: str | None) -> str | None:
        if value == "LOUD":
            raise ValueError("name: expected a quiet one, got LOUD")
        return value


class Outer(JobConfig):
    model: str
    output: Path = Path("out")
    seed: int = Field(0, ge=0)
    resume: bool = False
    sizes: tuple[int, ...] = (1, 2)
    fit: Inner = Inner()


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: from-file\nseed: 4\nfit: {lr: 1e-3, epochs: 7}\nsizes: [3]\n")
    config = load_config(Outer, file, ["fit.epochs=9", "seed=5", "resume=true"], model="given", output=tmp_path)
    assert config == Outer(
        model="given", output=tmp_path, seed=5, resume=True, sizes=(3,), fit=Inner(lr=1e-3, epochs=9)
    )


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("2", 2.0), ("-5.5E+1", -55.0), (".5e1", 5.0)])
def test_numbers_are_read_as_people_write_them(text: str, value: float) -> None:
    assert load_config(Outer, None, ["model=m", f"fit.lr={text}"]).fit.lr == value


def test_the_resolved_yaml_reads_back_to_the_same_config(tmp_path: Path) -> None:
    config = Outer(model="ü", fit=Inner(lr=1e-7))
    (tmp_path / "c.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(Outer, tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("fit.epoch=3", "unknown key 'fit.epoch': did you mean 'fit.epochs'?"),
        ("epochs=3", "unknown key 'epochs': did you mean 'fit.epochs'?"),
        ("moodel=x", "unknown key 'moodel': did you mean 'model'?"),
        ("zzzzzz=1", "unknown key 'zzzzzz': the keys are model, output, seed"),
        ("fit.epochs=three", 'fit.epochs: expected a whole number, got "three" (str)'),
        ("fit.epochs=3.5", "fit.epochs: expected a whole number, got 3.5 (float)"),
        ("fit.epochs=true", "fit.epochs: expected a whole number, got true (bool)"),
        ('fit.lr="0.1"', 'fit.lr: expected a number, got "0.1" (str)'),
        ("fit.lr=.nan", "fit.lr: expected a finite number, got NaN (float)"),
        ("resume=1", "resume: expected true or false, got 1 (int)"),
        ("fit.noise=open", "fit.noise: expected 'closed' or 'sampled', got \"open\" (str)"),
        ("fit.rows=0", "fit.rows: expected a whole number >= 1 or 'auto' or 'all', got 0 (int)"),
        ("fit.rows=few", "fit.rows: expected a whole number >= 1 or 'auto' or 'all', got \"few\" (str)"),
        ("fit.name=3", "fit.name: expected a string, got 3 (int)"),
        ("sizes=[1, x]", 'sizes.1: expected a whole number, got "x" (str)'),
        ("fit=3", "fit: expected a group of keys, got 3 (int)"),
        ("seed=-1", "seed: expected a whole number >= 0, got -1 (int)"),
        ("seed.x=1", 'seed: expected a whole number, got {"x": 1} (dict)'),
        ("seed", "--set: expected key=value, got 'seed'"),
        ("fit.name=\udcff", r"fit: expected UTF-8 text, got {'name': '\udcff'}"),
        ("fit.name=&a [*a]", "fit: expected a plain value, got YAML that contains itself"),
    ],
)
def test_a_wrong_entry_is_named(entry: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(Outer, None, ["model=m", entry])


def test_one_mistake_is_one_sentence_with_the_key_once() -> None:
    with pytest.raises(ValueError, match=r"^fit\.rows: expected [^;:]*$"):
        load_config(Outer, None, ["model=m", "fit.rows=few"])
    with pytest.raises(ValueError, match=r"^fit\.name: expected a quiet one, got LOUD$"):
        load_config(Outer, None, ["model=m", "fit.name=LOUD"])


def test_the_file_is_named_for_its_own_mistakes_only(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: m\nfit:\n  epochs: 3\n")
    for sets, given in ((["fit.lr=x"], {}), ([], {"seed": -1})):
        with pytest.raises(ValueError, match=r"^(fit\.lr|seed): expected"):
            load_config(Outer, file, sets, **given)
    file.write_text("model: m\nfit:\n  lr: x\n")
    with pytest.raises(ValueError, match=r"c\.yaml: fit\.lr: expected a number"):
        load_config(Outer, file, ["fit.epochs=4"], seed=1)


def test_a_missing_value_and_every_mistake_are_named() -> None:
    with pytest.raises(ValueError, match=r"model: a value is needed; fit\.lr: expected a number"):
        load_config(Outer, None, ["fit.lr=x"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1\n", "expected a mapping of keys to values, got list"),
        ("a: [\n", "expected YAML"),
        ("seed: 1\nseed: 2\n", "expected YAML, got the duplicate key 'seed'"),
        ("fit: {lr: 1, lr: 2}\n", "expected YAML, got the duplicate key 'lr'"),
        ("model: " + "[" * 5000, "expected YAML, got maximum recursion depth"),
        ("modell: x\n", "c.yaml: unknown key 'modell': did you mean 'model'"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_config(Outer, file, [] if "modell" not in content else ["model=m"])


def test_an_absent_file_is_named_and_an_empty_one_is_no_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.yaml: cannot be read"):
        load_config(Outer, tmp_path / "absent.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(Outer, tmp_path / "empty.yaml", model="m").model == "m"


def test_keys_are_listed_with_their_groups() -> None:
    inner = ["fit.lr", "fit.epochs", "fit.noise", "fit.rows", "fit.name"]
    assert config_keys(Outer) == ["model", "output", "seed", "resume", "sizes", *inner]


def test_the_template_explains_each_key_and_reads_back_to_the_defaults(tmp_path: Path) -> None:
    template = config_template(Outer)
    for lines in (
        "model:  # needed: a string\n",
        "seed: 0  # a whole number >= 0\n",
        "sizes: [1, 2]  # a list of whole numbers\n",
        "fit:\n",
        "  # Rows of it.\n  rows: auto  # a whole number >= 1 or 'auto' or 'all'\n",
        "  name: null  # a string or null\n",
    ):
        assert lines in template
    (tmp_path / "c.yaml").write_text(template)
    assert load_config(Outer, tmp_path / "c.yaml", model="m") == Outer(model="m")


def test_a_dotted_key_has_a_default_and_a_field() -> None:
    assert [config_default(Outer, key) for key in ("model", "fit.lr", "fit.name", "sizes")] == [
        None,
        "0.1",
        "null",
        "[1, 2]",
    ]
    assert config_field(Outer, "fit.rows").description == "Rows of it."
