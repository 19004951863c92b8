"""Rows of Parquet files and data sets, saved or by name; columns that Arrow has filled up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prudent.rlhf.data.pairs import load_pairs
from prudent.rlhf.data.reading import read_rows, value_of_line


def _write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_parquet_reads_as_json_lines_do(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {
            "prompt": [_message("user", "q")],
            "chosen": [_message("assistant", "a")],
            "rejected": [_message("assistant", "b")],
            "margin": None,
        },
        {
            "prompt": [_message("user", "r")],
            "chosen": [_message("assistant", "c")],
            "rejected": [_message("assistant", "d")],
            "margin": 1.0,
        },
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert load_pairs(tmp_path / "d.parquet").pairs == load_pairs(_write(tmp_path / "d.jsonl", rows)).pairs
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"broken\.parquet: expected a Parquet file"):
        load_pairs(tmp_path / "broken.parquet")


def test_a_broken_parquet_row_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": None, "rejected": "b"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"d\.parquet, row 2: expected chosen and rejected, but chosen is null"):
        load_pairs(tmp_path / "d.parquet")


def test_a_dataset_loads_by_name_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        _write(folder / f"{split}.jsonl", [{"prompt": "p", "chosen": split, "rejected": "b"}])
    assert [load_pairs(name).pairs[0].chosen for name in (folder, f"{folder}:test")] == ["train", "test"]
    with pytest.raises(ValueError, match="neither a file nor a dataset that loads with split 'dev'"):
        load_pairs(f"{folder}:dev")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(3)])
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([2])}).save_to_disk(tmp_path / "dict")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "prompts"),
    [
        ("one", ["p0", "p1", "p2"]),
        ("dict", ["p0", "p1", "p2"]),
        ("dict:test", ["p2"]),
        ("dict/test", ["p2"]),
    ],
)
def test_folders_of_save_to_disk_are_read(saved: Path, name: str, prompts: list[str]) -> None:
    pairs = load_pairs(f"{saved}/{name}").pairs
    assert [pair.prompt for pair in pairs] == prompts
    assert pairs[0].where == f"{saved}/{name}, row 1"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("one:test", "holds one data set without splits: leave out ':test'"),
        ("dict:dev", "the splits are train, test: choose one as in FOLDER:train"),
    ],
)
def test_a_split_that_a_saved_data_set_lacks_is_refused(saved: Path, name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_pairs(f"{saved}/{name}")


def test_keys_that_arrow_has_added_to_an_object_are_taken_off_again(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    calls: list[Any] = [[{"name": "look", "arguments": {"at": "it"}}], [{"name": "stop", "arguments": {"in": 3}}]]
    parquet.write_table(pyarrow.table({"calls": calls, "score": [None, 1]}), tmp_path / "d.parquet")
    rows = [row for _, row in read_rows("data", str(tmp_path / "d.parquet"))]
    assert rows == [{"calls": calls[0], "score": None}, {"calls": calls[1], "score": 1}]


def test_a_parquet_file_that_breaks_off_is_named_with_its_last_good_row(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "d.parquet"
    table = pyarrow.table({"prompt": [f"{i} {i * 7919}" for i in range(5000)]})
    parquet.write_table(table, file, row_group_size=1024, compression="gzip", use_dictionary=False)
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 3000] = bytes(3000)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"data: .*d\.parquet: expected a Parquet file, got .* after row \d+$"):
        list(read_rows("data", str(file)))


def test_deep_nesting_is_measured_and_brackets_in_a_text_are_not() -> None:
    assert value_of_line(b'{"text": "' + b"[" * 500 + b'"}') == {"text": "[" * 500}
    assert value_of_line(b"[" * 100 + b"]" * 100)
