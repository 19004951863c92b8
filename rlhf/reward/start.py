"""Load the models and pairs that a training run starts from, and check that they fit the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...engine import EnsembleRewardConfig, EnsembleRewardModel
from ...engine.taps import layers_of, parse_taps
from ..data.pairs import PairData, PreferencePair, readable_pairs, split_by_prompt, text_reader
from ..data.reading import check_source
from ..models.loading import load_config, load_reward, load_reward_config, logger
from .config import TrainConfig


def check_given(config: TrainConfig, mode: str) -> None:
    """Raise ValueError for missing data, a `stage1` that cannot replace stage 1, or a reward model given as `model`
    alone.

    Only configurations are read.
    """
    check_source("data", config.data)
    if config.stage1 is None:
        _check_trunk(config)
        if config.start is not None:
            load_reward_config("pet.start", config.start, append_eos=config.append_eos)
        return
    if mode == "head" and config.model != config.stage1:
        raise ValueError(
            f"model: expected stage1's {config.stage1}, because mode head trains on stage 1's own trunk, "
            f"got {config.model}"
        )
    if config.model != config.stage1:
        _check_trunk(config)
    found = load_reward_config("stage1", config.stage1, append_eos=config.append_eos)
    if isinstance(found, EnsembleRewardConfig) and found.num_heads != 1:
        raise ValueError(f"stage1: expected a reward model with one head, got {found.num_heads} in {config.stage1}")


def load_stage1(config: TrainConfig) -> EnsembleRewardModel:
    """`config.stage1` as a single-head model whose reward differences are Bradley-Terry logits.

    Its calibration is removed: Bradley-Terry trained the head's own outputs, not their z-scores.
    """
    model = load_frozen("stage1", str(config.stage1), config)
    model.score.reset_calibration()
    return model


def load_frozen(key: str, name: str, config: TrainConfig) -> EnsembleRewardModel:
    """Load the trained reward model under the config's `key`, with its heads, aggregation and calibration, frozen."""
    model = load_reward(key, name, dtype=config.dtype, append_eos=config.append_eos).model
    if config.max_length is not None:
        model.config.max_score_length = config.max_length
    model.requires_grad_(False)
    return model


def _check_trunk(config: TrainConfig) -> None:
    name = config.model
    found = load_config("model", name, "a language model's folder or hub name")
    if isinstance(found, EnsembleRewardConfig):
        raise ValueError(
            f"model: expected a language model, got the reward model {name}, whose heads would be dropped: to continue "
            "from one with a single head, give it as stage1 too"
        )
    if config.features not in ("auto", "last"):
        try:
            parse_taps(config.features, layers_of(found))
        except ValueError as error:
            raise ValueError(f"features: {str(error).removeprefix('taps: ')}, for the model {name}") from None
    if any(kind.endswith("ForSequenceClassification") for kind in found.architectures or ()):
        logger.warning("model: %s has a classification head, which is dropped; to keep it, give it as stage1 too", name)


def split_readable(
    config: TrainConfig, data: PairData, tokenizers: Mapping[str, Any], progress: bool
) -> list[list[PreferencePair]]:
    """Return [training pairs, held-out pairs] that all tokenisers of the run can read; correct `data.counts`.

    tokenizers: see `Run`. Raises ValueError, naming file and line, for the first such pair unless config.skip_bad_rows.
    """
    different = {id(tokenizer): tokenizer for name, tokenizer in tokenizers.items() if name != "policy"}
    return readable_pairs(
        split_by_prompt(data.pairs, config.eval_fraction, config.seed),
        [text_reader(tokenizer) for tokenizer in different.values()],
        data.counts,
        prompt_encoders=[text_reader(tokenizers[name]) for name in ("policy",) if name in tokenizers],
        skip_bad_rows=config.skip_bad_rows,
        progress=progress,
    )
