"""The configs of `prudent score` and `prudent eval`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from ..job.config import JobConfig


class ScoreConfig(JobConfig):
    """What to score, with which model, and where to write the rewards."""

    model: str = Field(description="Reward model, an ensemble or any one-head sequence classifier: folder or hub name.")
    data: str = Field(description='Responses to score, JSON lines; "-": standard input.')
    output: str = Field(description='JSON lines to write; "-": standard output.')
    aggregation: str | None = Field(
        default=None,
        description="How K heads are combined into one reward, e.g. tradeoff:0.4, min or lcb:1; null: the model's own.",
    )
    batch_tokens: int = Field(default=4096, ge=1, description="Tokens in one forward pass, padding included.")
    max_length: int | None = Field(
        default=None, ge=1, description="Tokens kept, from the end, of a longer text; null: the model's limit."
    )
    append_eos: bool | None = Field(
        default=None,
        description="Whether a classifier trained elsewhere read EOS after plain texts; null: yes for decoders.",
    )
    skip_bad_rows: bool = Field(
        default=False, description="Write broken rows with a null reward and an error instead of stopping at the first."
    )


class EvalConfig(JobConfig):
    """Which model to evaluate, on which pairs, and where to write the results."""

    model: str = Field(description="Reward model, an ensemble or any one-head sequence classifier: folder or hub name.")
    data: str = Field(description="Preference pairs: JSON lines, Parquet, or a data set name (NAME:SPLIT).")
    output: Path = Field(
        description="Folder for eval.json and the pictures, which replace those of an earlier evaluation."
    )
    aggregation: str | None = Field(
        default=None,
        description="How K heads are combined into one reward, e.g. tradeoff:0.4, min or lcb:1; null: the model's own.",
    )
    compare: str | None = Field(
        default=None, description="Another reward model, such as stage 1's, to score on the same pairs; null: none."
    )
    foreign: str | None = Field(
        default=None,
        description="Pairs unlike the training data, which std and disagreement should detect; null: none.",
    )
    eval_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Read only the prompts that a training run with this eval_fraction held out; 0: all prompts.",
    )
    split_seed: int = Field(
        default=0, description="Seed of the training run whose held-out prompts eval_fraction selects."
    )
    min_score_gap: float = Field(
        default=2.0,
        gt=0,
        description="Smallest score difference of two responses that make a pair, if data has scores.",
    )
    append_eos: bool | None = Field(
        default=None,
        description="Whether a classifier trained elsewhere read EOS after plain texts; null: yes for decoders.",
    )
    skip_bad_rows: bool = Field(
        default=False, description="Count broken rows and continue instead of stopping at the first."
    )
    limit: int | None = Field(default=None, ge=1, description="Rows to read of each data file; null: all.")
    batch_tokens: int = Field(default=4096, ge=1, description="Tokens in one forward pass, padding included.")
    max_length: int | None = Field(
        default=None, ge=1, description="Tokens kept, from the end, of a longer text; null: the model's limit."
    )
    resamples: int = Field(default=1000, ge=100, description="Number of resamples of the bootstrap.")
    seed: int = Field(default=0, description="Seed of the bootstrap.")
    feature_cache: Path | None = Field(
        default=None, description="Folder of cached features, such as a training run's, to read and add to; null: none."
    )
    pictures: bool = Field(default=True, description="Draw the pictures, which needs matplotlib.")
