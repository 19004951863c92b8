"""Run `prudent export`: write a reward model as transformers, TRL, vLLM, OpenRLHF and verl load it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...engine import EnsembleRewardConfig
from ...engine.export import Prepared, check_form, prepare
from ...kernels import Aggregation
from ..job.files import atomic_folder
from ..models.loading import load_reward, load_reward_config, model_folder
from ..report.card import write_card
from .card import export_card
from .config import ExportConfig

__all__ = ["ExportConfig", "ExportResult", "run_export"]


@dataclass(frozen=True)
class ExportResult:
    """folder: of the exported model; prepared: what was written; str() says what the folder is and what to know."""

    folder: Path
    prepared: Prepared

    def __str__(self) -> str:
        done, note = self.prepared, self.prepared.note
        kind = type(done.model).__name__
        lines = [f"{self.folder}: {kind} ({done.form}), aggregation {note['aggregation']}"]
        if done.constant:
            lines.append(f"  its reward is the model's less {done.constant:g}, the same for every response")
        if done.padded:
            lines.append(f"  padded with {done.tokenizer.pad_token}, because the old padding token can end a text")
        if done.form == "stock":
            lines.append("  its logits become a reward by prudent_client.py beside them")
        eos = "with" if note["append_eos"] else "without"
        lines.append(f"  plain texts are read {eos} an end-of-sequence token; README.md says how to load it")
        return "\n".join(lines)


def run_export(config: ExportConfig, *, progress: bool = True) -> ExportResult:
    """Write `config.model` to the new folder `config.to`; see `engine.export` for the forms.

    Everything that can be refused is, before the folder exists; it appears in one step, whole.

    Args:
        config: see `ExportConfig`.
        progress: unused; transformers shows its own bars.

    Raises:
        ValueError: for a folder that exists, a model that cannot be read, or one that the form cannot carry.
    """
    if config.to.exists():
        raise ValueError(f"to: expected a new folder, got {config.to}, which exists")
    source = model_folder(config.model)
    found: Any = load_reward_config("model", source, append_eos=config.append_eos)
    spec = None if config.aggregation is None else Aggregation.parse(config.aggregation)
    if isinstance(found, EnsembleRewardConfig):  # before gigabytes of weights are read
        asked = spec or Aggregation.parse(found.aggregation)
        asked.check_heads(found.num_heads)
        check_form(found, config.as_, asked)
    reward = load_reward("model", source, append_eos=config.append_eos)
    prepared = prepare(reward.model, reward.tokenizer, config.as_, spec)
    with atomic_folder(config.to) as folder:
        prepared.write(folder, config.max_shard_size)
        write_card(folder, export_card(Path(source), prepared, reward.model, config))
    return ExportResult(config.to, prepared)
