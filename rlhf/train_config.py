"""The config of `prudent train`, its run folder, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from ..kernels import Aggregation
from .config import JobConfig
from .files import read_json
from .fit_config import BradleyTerryConfig, BRMEConfig
from .pet_config import PETConfig
from .run_folder import claim_folder
from .trunk_config import TrunkConfig


class TrainConfig(JobConfig):
    """Everything `prudent train` can be told."""

    model: str  # folder or hub name of a language model
    data: str  # file or dataset name, see load_pairs
    output: Path  # the run folder
    # folder or hub name of a one-head reward model (EnsembleRewardModel, or what from_sequence_classifier takes) to use
    # instead of training stage 1; in mode head its trunk is the trunk, and `model` must name it too
    stage1: str | None = None
    # head: the trunk frozen, its features cached; lora, full: the trunk trained too; auto: head on a CPU, lora on a GPU
    mode: Literal["auto", "head", "lora", "full"] = "auto"
    # the last stage: bt stops after Bradley-Terry; pet makes what pet.start names pessimistic against best-of-n
    stage: Literal["bt", "brme", "pet"] = "brme"
    aggregation: str = "tradeoff:0.4"  # what the saved model answers with
    min_score_gap: float = Field(default=2.0, gt=0)
    skip_bad_rows: bool = False
    limit: int | None = Field(default=None, ge=1)  # rows of data
    eval_fraction: float = Field(default=0.1, ge=0, lt=1)  # of the prompts
    seed: int = Field(default=0, ge=0, lt=2**30)  # of everything; bt.seed, brme.seed and pet.seed are added to it
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the trunk; auto: the checkpoint's, float32 in mode full
    append_eos: bool | None = None  # see EnsembleRewardConfig
    batch_tokens: int = Field(default=4096, ge=1)
    max_length: int | None = Field(
        default=None, ge=1
    )  # tokens; a longer text loses its beginning; saved with the model
    features: Path | None = None  # a cache folder that several runs share; None: in the run folder
    bt: BradleyTerryConfig = BradleyTerryConfig()
    brme: BRMEConfig = BRMEConfig()
    pet: PETConfig = PETConfig()
    trunk: TrunkConfig = TrunkConfig()

    @field_validator("aggregation")
    @classmethod
    def _known_aggregation(cls, value: str) -> str:
        return str(Aggregation.parse(value))

    @property
    def start(self) -> str | None:
        """The reward model that stage pet starts from where it is given; None: it is trained in this run."""
        return self.pet.start if self.stage == "pet" and self.pet.start not in ("bt", "brme") else None

    @property
    def supervised(self) -> Literal["bt", "brme"] | None:
        """The last stage that is trained on the pairs alone."""
        last = self.pet.start if self.stage == "pet" else self.stage
        return None if self.start is not None else "brme" if last == "brme" else "bt"


_DROPPED = {
    "bad_rows": "broken rows skipped",
    "duplicates": "duplicate pairs dropped",
    "equal": "pairs of two equal responses dropped",
    "below_gap": "pairs below min_score_gap dropped",
}


@dataclass(frozen=True)
class TrainResult:
    """folder: the run folder. metrics: what train.json holds. finished_before: nothing was left to do."""

    folder: Path
    metrics: dict[str, Any]
    finished_before: bool = False

    def __str__(self) -> str:
        m = self.metrics
        head = "was finished before; nothing was done again" if self.finished_before else "finished"
        pairs = _count(m["train_pairs"], "pair")
        lines = [f"{self.folder}: {head}", f"{pairs} trained on, {m['held_out_pairs']} held out"]
        lines += [f"{what}: {m['dropped'][key]}" for key, what in _DROPPED.items() if m["dropped"][key]]
        if m["accuracy"]:
            width = max(map(len, m["accuracy"]))
            lines.append("held-out accuracy")
            lines += [f"  {name:<{width}}  {value:.3f}" for name, value in m["accuracy"].items()]
        lines += _pet_lines(m["pet"]) if "pet" in m else []
        lines.append(f"model: {self.folder / 'model'}")
        return "\n".join(lines)


def _pet_lines(pet: dict[str, Any]) -> list[str]:
    """What PET did, and what to beware of."""
    before, after = pet["before"], pet["after"]
    rows = [("gap, best of n - reference", "gap"), ("Bradley-Terry loss", "bt"), ("accuracy", "accuracy")]
    asked = _count(pet["prompts"], "prompt")
    lines = [f"PET on {asked}, n = {pet['samples']}, beta = {pet['beta']:g}; before -> after"]
    for side, prefix in (("training", ""), ("held-out", "eval_")):
        lines += [
            f"  {f'{side} {name}':<38}{before[prefix + key]:>8.3f} -> {after[prefix + key]:.3f}"
            for name, key in rows
            if prefix + key in after
        ]
    if pet["prompts_too_long"]:
        lines.append(f"prompts too long to be sampled for: {pet['prompts_too_long']}")
    if after["gap"] < 0:
        lines.append(
            "beware: the reference responses now score above the best of the policy's own: the reward tells the two "
            "sources apart, which lowers the objective without end; pet.hinge=all or pet.reference=sample prevents it"
        )
    return lines


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


# what a resumed run may change; a lower batch_tokens is what helps one that was killed for memory
_FREE = ("output", "batch_tokens")
_LOOP_KEYS = ("lr", "epochs", "max_steps", "batch_size", "weight_decay", "warmup")  # of FitConfig and of TrunkConfig


def refuse_unread(config: TrainConfig, mode: str) -> None:
    """Raise ValueError for a key that was set and that this mode, or a given stage 1, leaves unread; say what works."""
    where = f"mode {mode}" + (" (what auto is on this machine)" if config.mode == "auto" else "")
    if config.stage != "pet":
        for key in _changed(config.pet):
            raise ValueError(f"pet.{key}: has no effect with stage {config.stage}: set stage to pet")
    if config.stage == "pet" and mode != "head":
        raise ValueError(
            "mode: expected head with stage pet, which trains heads on a trunk that stands (train that with stage bt "
            f"or brme and give it as pet.start), got {mode}"
        )
    if config.start is not None:
        for group in ("bt", "brme"):
            for key in _changed(getattr(config, group)):
                raise ValueError(
                    f"{group}.{key}: has no effect beside pet.start {config.start}, which is trained already"
                )
    if config.stage1 is not None:
        if config.stage == "pet":
            raise ValueError(
                "stage1: expected none with stage pet, whose model is the language model that is sampled: give the "
                f"reward as pet.start, got {config.stage1}"
            )
        if config.stage == "bt":
            raise ValueError("stage: expected brme beside stage1, which leaves nothing to do for bt, got bt")
        for key in _changed(config.bt):
            raise ValueError(f"bt.{key}: has no effect beside stage1, which is trained already: leave one of them out")
    for group in ("bt", "brme") if mode != "head" else ():
        for key in _changed(getattr(config, group)):
            if key in _LOOP_KEYS:
                raise ValueError(f"{group}.{key}: has no effect in {where}: set trunk.{key}")
    groups = ["bt", "brme", *(["pet"] if config.stage == "pet" else [])]
    for key in _changed(config.trunk):
        if mode == "head":
            use = " and ".join(f"{group}.{key}" for group in groups)
            use = f"set {use}" if key in _LOOP_KEYS else "set mode to lora or full"
            raise ValueError(f"trunk.{key}: has no effect in {where}: {use}")
        if mode == "full" and key.startswith("lora_"):
            raise ValueError(f"trunk.{key}: has no effect in {where}: set mode to lora")


def _changed(config: JobConfig) -> list[str]:
    return [name for name, field in type(config).model_fields.items() if getattr(config, name) != field.default]


MADE = ("metrics.jsonl", "features", "checkpoints", "stage1", "train.json")  # by a run that computes


def open_folder(config: TrainConfig, resume: bool) -> dict[str, Any] | None:
    """Claim the output folder. The final metrics if the run in it is finished, else None."""
    if not claim_folder(config, MADE, free=_FREE, resume=resume):
        (config.output / "data.json").unlink(missing_ok=True)  # of a run that was refused
        return None
    done = config.output / "train.json"
    return read_json(done) if done.exists() else None
