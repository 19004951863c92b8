"""`prudent sample`: responses that score and calibrate read, and the same bytes however often the run was killed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prudent.rlhf.data.rows import items_of_row, prompt_of_row
from prudent.rlhf.sampling import sample as job
from prudent.rlhf.sampling.prompts import Prompt
from prudent.rlhf.sampling.sample import SampleConfig, run_sample

PROMPTS = ["the food was", "my day", "it was a long film", "the hotel was", "your train"]
ROLLOUT = {"samples_per_prompt": 2, "max_new_tokens": 6, "prompts_per_step": 2}


@pytest.fixture
def make(tiny_chat_folder: Path, tmp_path: Path) -> Any:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")

    def config(**changes: Any) -> SampleConfig:
        given = {"model": str(tiny_chat_folder), "prompts": str(tmp_path / "prompts.txt"), "rollout": ROLLOUT}
        return SampleConfig(**{**given, "output": tmp_path / "out.jsonl", **changes})

    return config


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_prompt_has_its_responses_in_order_and_score_reads_them(make: Any) -> None:
    config = make()
    result = run_sample(config, progress=False)
    rows = _rows(config.output)
    assert [row["prompt"] for row in rows] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert all(items_of_row(row) == [{"prompt": row["prompt"], "response": row["response"]}] for row in rows)
    assert len({row["response"] for row in rows}) > 5
    assert (result.rows, result.prompts, result.kept) == (10, 5, 0)
    assert result.stopped == sum(row["stopped"] for row in rows)
    assert "10 responses to 5 prompts" in str(result)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [{"role": "user", "content": "hello there"}]},
        {"system": "be short", "prompt": "hello there"},
        {"history": [["hi", "yes"]], "prompt": "hello there"},
    ],
    ids=["messages", "system", "history"],
)
def test_a_prompt_of_any_form_is_written_so_that_it_is_read_as_the_same(
    make: Any, tmp_path: Path, row: dict[str, Any]
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    config = make(prompts=str(tmp_path / "rows.jsonl"))
    run_sample(config, progress=False)
    for written in _rows(config.output):
        assert prompt_of_row(written) == prompt_of_row(row)
        assert items_of_row(written)[0]["response"] == written["response"]


def test_tools_are_written_beside_the_prompt() -> None:
    row = {"prompt": "hello there", "tools": [{"name": "look", "parameters": {}}]}
    written = job._line(Prompt(prompt_of_row(row), [1]), "yes", True)
    assert items_of_row(written) == items_of_row({**row, "response": "yes"})


def test_the_seed_decides(make: Any, tmp_path: Path) -> None:
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        config = make(output=tmp_path / name, seed=seed)
        run_sample(config, progress=False)
        texts.append(config.output.read_bytes())
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("bytes_lost", [1, 200])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_killed_run_resumes_to_the_same_bytes(
    make: Any, monkeypatch: pytest.MonkeyPatch, steps: int, bytes_lost: int
) -> None:
    config = make()
    run_sample(config, progress=False)
    whole = config.output.read_bytes()
    config.output.unlink()
    calls = []

    def killed(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > steps:
            raise KeyboardInterrupt
        return draw(*arguments, **options)

    draw = job.draw_responses
    monkeypatch.setattr(job, "draw_responses", killed)
    with pytest.raises(KeyboardInterrupt):
        run_sample(config, progress=False)
    monkeypatch.undo()
    config.output.write_bytes(config.output.read_bytes()[:-bytes_lost])  # as if in the middle of a write
    result = run_sample(config, resume=True, progress=False)
    assert config.output.read_bytes() == whole
    assert result.kept < 4 * steps
    assert result.stopped == sum(row["stopped"] for row in _rows(config.output))


def test_a_larger_limit_goes_on_where_the_smaller_one_ended(make: Any, tmp_path: Path) -> None:
    run_sample(make(limit=3), progress=False)
    result = run_sample(make(), resume=True, progress=False)
    run_sample(make(output=tmp_path / "once.jsonl"), progress=False)
    assert make().output.read_bytes() == (tmp_path / "once.jsonl").read_bytes()
    assert (result.rows, result.kept) == (10, 4)  # the whole step of two prompts


def test_an_output_that_exists_is_neither_lost_nor_mixed(make: Any, tmp_path: Path) -> None:
    config = make()
    run_sample(config, progress=False)
    before = config.output.read_bytes()
    with pytest.raises(ValueError, match=r"exists already; resume it, overwrite it, or choose another"):
        run_sample(config, progress=False)
    with pytest.raises(ValueError, match="expected resume or overwrite, got both"):
        run_sample(config, resume=True, overwrite=True, progress=False)
    with pytest.raises(ValueError, match=r"cannot be resumed: it was made with another seed"):
        run_sample(make(seed=7), resume=True, progress=False)
    with pytest.raises(ValueError, match=r"responses to 4 prompts, and 1 are asked for"):
        run_sample(make(limit=1), resume=True, progress=False)
    (tmp_path / "prompts.txt").write_text("\n".join(["another one", *PROMPTS[1:]]) + "\n")
    with pytest.raises(ValueError, match=r"line 1 has another prompt"):
        run_sample(config, resume=True, progress=False)
    assert config.output.read_bytes() == before
    run_sample(config, overwrite=True, progress=False)
    assert config.output.read_bytes() != before


def test_another_model_of_the_same_name_is_refused(make: Any, tiny_chat_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_chat_folder, tmp_path / "model")
    config = make(model=str(folder))
    run_sample(config, progress=False)
    weights = {name: value + 0.01 for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="has changed since"):
        run_sample(config, resume=True, progress=False)


def test_without_its_record_an_output_cannot_be_resumed(make: Any) -> None:
    config = make()
    run_sample(config, progress=False)
    Path(f"{config.output}.config.json").unlink()
    with pytest.raises(ValueError, match=r"out.jsonl.config.json, which says how it was made, is missing"):
        run_sample(config, resume=True, progress=False)


def test_broken_prompts_are_refused_or_counted(make: Any, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "my day"}\n{"prompt": 3}\n')
    config = make(prompts=str(rows))
    with pytest.raises(ValueError, match=r"prompts: .*rows.jsonl, line 2: prompt: expected a text"):
        run_sample(config, progress=False)
    assert not config.output.exists()
    result = run_sample(make(prompts=str(rows), skip_bad_rows=True), progress=False)
    assert (result.prompts, result.bad_rows) == (1, 1)
    assert "1 broken row" in str(result)


def test_a_folder_or_a_reward_model_is_refused(make: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"output: expected a file, got .*, a folder"):
        run_sample(make(output=tmp_path), progress=False)
    with pytest.raises(ValueError, match="model: "):
        run_sample(make(model=str(tmp_path / "nothing")), progress=False)


def test_the_callers_random_state_stays(make: Any) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    run_sample(make(), progress=False)
    assert torch.equal(torch.rand(2), expected)
