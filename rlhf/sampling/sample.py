"""Run `prudent sample`: write a language model's responses to prompts, for `prudent calibrate` and `prudent score`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..job.files import atomic_write_json, read_json, repaired_json_lines, writing
from ..job.record import record_path, refuse_other_settings, refuse_to_replace
from ..models.features import model_fingerprint
from ..models.loading import load_language_model, load_tokenizer
from .config import SampleConfig
from .draw import draw_responses
from .prompts import Prompt, load_prompts, longest_prompt
from .sampler import open_sampler
from .turn import Turn

__all__ = ["SampleConfig", "SampleResult", "run_sample"]


@dataclass(frozen=True)
class SampleResult:
    """output: the file. rows: its lines. kept: those of an earlier run. stopped: responses that ended by themselves."""

    output: Path
    rows: int
    kept: int
    prompts: int
    stopped: int
    bad_rows: int

    def __str__(self) -> str:
        kept = f", {self.kept} of them from an earlier run" if self.kept else ""
        lines = [
            f"{self.output}: {self.rows} responses to {self.prompts} prompts{kept}",
            f"  {self.stopped / self.rows:.0%} ended by themselves; the others were cut off at rollout.max_new_tokens",
        ]
        if self.bad_rows:
            lines.append(f"  {self.bad_rows} broken rows of prompts skipped")
        return "\n".join(lines)


def run_sample(
    config: SampleConfig, *, resume: bool = False, overwrite: bool = False, progress: bool = True
) -> SampleResult:
    """Sample `config.rollout.samples_per_prompt` responses to every prompt, and write them in the prompts' order.

    A line has the prompt's fields, `response` (a text) and `stopped` (whether it ended by itself); `prudent score` and
    `prudent calibrate` read it. A response depends on seed, prompt number and sample number alone. Whole steps
    (`rollout.prompts_per_step`) of an interrupted run are kept, so a resumed run writes the same bytes as one that was
    not interrupted. `<output>.config.json` records how the output was made.

    Raises:
        ValueError: for a broken prompt, naming file and line (unless skip_bad_rows); a model that cannot be sampled
            from; an output that exists already, or that another config or model made.
    """
    kept = _kept(config, resume, overwrite)
    tokenizer = load_tokenizer("model", config.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    model = load_language_model("model", config.model, getattr(torch, dtype)).eval().to(device)
    turn = Turn(tokenizer, model)
    longest = longest_prompt(config.rollout, model.config, turn)
    data = load_prompts(config.prompts, turn, longest, skip_bad_rows=config.skip_bad_rows, progress=progress)
    prompts = data.prompts[: config.limit]
    sampler = open_sampler(config.rollout, model, turn.stop, device, turn.ending)
    record = {**_settings(config), "weights": model_fingerprint(model)}
    _refuse_others(config, kept, record, prompts)
    _begin(config, kept, record)
    count, step = config.rollout.samples_per_prompt, config.rollout.prompts_per_step
    done, stopped = len(kept), sum(bool(row["stopped"]) for row in kept)
    options: dict[str, Any] = {"initial": done, "unit": "resp", "disable": not progress}
    with (
        writing(config.output),
        config.output.open("ab") as file,
        tqdm(desc="responses", total=count * len(prompts), **options) as bar,
    ):
        for start in range(done // count, len(prompts), step):
            rows = [(i, s) for i in range(start, min(start + step, len(prompts))) for s in range(count)]
            ids, keys = [prompts[i].ids for i, _ in rows], [f"{config.seed}/{i}/{s}" for i, s in rows]
            responses, ended = draw_responses(sampler, model, ids, keys, config.rollout, progress=False)
            for (i, _), response, stop in zip(rows, responses, ended, strict=True):
                text = turn.text(prompts[i].ids, response, stop)
                file.write(json.dumps(_line(prompts[i], text, stop), ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            stopped += sum(ended)
            bar.update(len(rows))
    return SampleResult(config.output, count * len(prompts), done, len(prompts), stopped, data.bad_rows)


def _line(prompt: Prompt, response: str, stopped: bool) -> dict[str, Any]:
    """A row of the output; `data.rows.items_of_row` reads the same prompt and response from it."""
    return {**_fields(prompt.item), "response": response, "stopped": stopped}


def _fields(item: Any) -> dict[str, Any]:
    """The columns of a prompt (see `data.columns.Prompt`)."""
    if not isinstance(item, Mapping):
        return {"prompt": item}
    rest = {key: value for key, value in item.items() if key not in ("text", "messages")}
    return {**rest, "prompt": item["text"] if "text" in item else item["messages"]}


def _settings(config: SampleConfig) -> dict[str, Any]:
    """What a resumed run must share with the run that it continues; the limit may grow."""
    return config.model_dump(mode="json", exclude={"output", "limit"})


def _kept(config: SampleConfig, resume: bool, overwrite: bool) -> list[dict[str, Any]]:
    """Check the output against the flags; return the lines that are kept, those of whole steps."""
    output = config.output
    if resume and overwrite:
        raise ValueError("sample: expected resume or overwrite, got both")
    if output.is_dir():
        raise ValueError(f"output: expected a file, got {output}, a folder")
    if overwrite or not output.exists() or output.stat().st_size == 0:
        return []
    if not resume:
        refuse_to_replace(output)
    refuse_other_settings(output, _settings(config))
    rows, step = repaired_json_lines(output), config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    return rows[: len(rows) // step * step]


def _refuse_others(
    config: SampleConfig, kept: list[dict[str, Any]], record: Mapping[str, Any], prompts: list[Prompt]
) -> None:
    """Raise ValueError unless the kept lines are of this model and these prompts."""
    if not kept:
        return
    where, count = f"output: {config.output} cannot be resumed", config.rollout.samples_per_prompt
    if read_json(record_path(config.output)).get("weights") != record["weights"]:
        raise ValueError(f"{where}: the model {config.model} has changed since")
    if len(kept) > count * len(prompts):
        raise ValueError(f"{where}: it has responses to {len(kept) // count} prompts, and {len(prompts)} are asked for")
    for number, row in enumerate(kept):
        fields = _fields(prompts[number // count].item)
        if any(row.get(key) != value for key, value in fields.items()) or not {"response", "stopped"} <= row.keys():
            raise ValueError(f"{where}: line {number + 1} has another prompt; has a file changed?")


def _begin(config: SampleConfig, kept: list[dict[str, Any]], record: Mapping[str, Any]) -> None:
    """Cut the output to the lines that are kept, and record how it is made."""
    output = config.output
    output.parent.mkdir(parents=True, exist_ok=True)
    with writing(output), output.open("ab") as file:
        file.truncate(sum(len(line) for line in _lines(output, len(kept))))
    atomic_write_json(record_path(config.output), dict(record))


def _lines(path: Path, number: int) -> list[bytes]:
    with path.open("rb") as file:
        return [line for _, line in zip(range(number), file, strict=False)]
