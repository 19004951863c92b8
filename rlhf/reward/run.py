"""One run of `prudent train`: its pairs, tokenisers and folder, and the operations that all modes share."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...engine import EnsembleHead, EnsembleRewardModel, Scorer
from ...engine.config import is_encoder
from ...engine.likelihood import special_ids
from ...kernels import Aggregation
from ..data.pairs import PreferencePair, both_sides, load_pairs, names_of_sides
from ..evaluation.statistics import group_labels
from ..job.files import atomic_folder, atomic_write_json, read_json
from ..job.log import RunLog
from ..models.features import compute_features
from ..models.loading import load_config, load_tokenizer, load_trunk
from ..report.fit import FIT_FILE
from ..report.words import truncated_texts
from .config import FitConfig, TrainConfig
from .region import without_price
from .start import check_given, split_readable

logger = logging.getLogger(__name__)

Sides = tuple[Tensor, Tensor]  # features of P pairs: chosen, rejected [P, F]


class Truncation(NamedTuple):
    """`texts` of `of` texts lost their beginning; same: number of pairs whose two texts are the same to the model."""

    texts: int
    of: int
    same: int


@dataclass(frozen=True)
class Scored:
    """A head, and the features of the held-out pairs that it reads; None without held-out pairs."""

    head: EnsembleHead
    features: Sides | None

    @torch.no_grad()
    def rewards(self, aggregation: str) -> Sides:
        """Rewards [P] of chosen and of rejected, on the CPU."""
        assert self.features is not None
        # not centred: to centre each side alone would shift one side against the other
        outputs = [self.head(side, aggregation=aggregation, centre="none").reward.cpu() for side in self.features]
        return outputs[0], outputs[1]


# the distance sees foreign text best in these, and heads rank human pairs no worse (docs/features.md)
AUTO_TAPS = ("last:-1", "mean:2/3", "logprob")


class Run:
    """The pairs of a run, split; its tokenisers; and its folder, which keeps models and features.

    mode: head, lora or full. device: of the models. train, held_out: the pairs. tokenizers: "stage1", "model" and
    "start" belong to the models in these folders; "policy" belongs to the language model that stage pet samples.
    """

    def __init__(self, config: TrainConfig, mode: str, log: RunLog, resume: bool, progress: bool) -> None:
        self.config, self.mode, self.log, self.resume, self.progress = config, mode, log, resume, progress
        self.folder = config.output
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        check_given(config, mode)
        self.tokenizers = _tokenizers(config)
        data = load_pairs(
            config.data,
            min_score_gap=config.min_score_gap,
            skip_bad_rows=config.skip_bad_rows,
            limit=config.limit,
            progress=progress,
        )
        self.train, self.held_out = split_readable(config, data, self.tokenizers, progress)
        if config.supervised == "brme":
            Aggregation.parse(config.aggregation).check_heads(config.brme.num_heads)
            if config.brme.num_heads > len(self.train):
                raise ValueError(
                    f"brme.num_heads: expected at most the {len(self.train)} training pairs, "
                    f"got {config.brme.num_heads}"
                )
        self.dropped = {name: data.counts[name] for name in ("bad_rows", "duplicates", "equal", "below_gap")}
        self.counts = self._count(data.counts)

    def _count(self, counts: dict[str, Any]) -> dict[str, Any]:
        """Write data.json, or check that the data has not changed since an earlier start of the run."""
        digest = hashlib.sha256(repr((self.train, self.held_out)).encode()).hexdigest()[:16]
        summary = {
            "data": self.config.data,
            "fingerprint": digest,
            **counts,
            "train_pairs": len(self.train),
            "held_out_pairs": len(self.held_out),
            "held_out_prompts": len({pair.prompt_key for pair in self.held_out}),
        }
        path = self.folder / "data.json"
        if path.exists():
            before = read_json(path)
            if before.get("fingerprint") != digest:
                raise ValueError(
                    f"data: {self.config.data} has changed since the run in {self.folder} began: choose another folder"
                )
            summary = {**before, **summary}
        atomic_write_json(path, summary)
        return summary

    def load(
        self, num_heads: int, losses: FitConfig | None = None, trunk: Any = None, name: Path | None = None
    ) -> EnsembleRewardModel:
        """Put fresh heads on the trunk of `config.model`, or on `trunk`, a language model that is loaded already.

        losses: config of the stage that will train the model in modes lora and full; None: frozen, for features.
        name: folder of a model whose trunk takes the place of `config.model`.
        """
        config = self.config
        options: dict[str, Any] = {
            "num_heads": num_heads,
            "aggregation": "mean" if num_heads == 1 else without_price(config.aggregation),
            "std_floor": None if losses is None else losses.std_floor,
            "append_eos": config.append_eos,
            "max_score_length": config.max_length,
            "logprob_skips": special_ids(self.tokenizers["model"]),
        }
        dtype = "float32" if config.dtype == "auto" and self.mode == "full" else config.dtype

        def reading(taps: Any) -> EnsembleRewardModel:
            torch.manual_seed(config.seed if losses is None else losses.seed)
            if trunk is not None:
                return self.placed(EnsembleRewardModel.from_trunk(trunk, taps=taps, **options))
            return self.placed(load_trunk("model", str(name or config.model), dtype=dtype, taps=taps, **options))

        if config.features != "auto":
            return reading(config.features)
        known = load_config("model", str(name or config.model), "a language model") if trunk is None else trunk.config
        # without logprob for a head with a bias, the last state alone for a trunk whose layers cannot be read
        for taps in (AUTO_TAPS, AUTO_TAPS[:-1]) if self.mode == "head" and not is_encoder(known) else ():
            try:
                model = reading(taps)
                _probe(model)
            except ValueError as error:
                logger.warning("features: not %s: %s", ", ".join(taps), error)
            else:
                return model
        return reading("last")

    def placed(self, model: Any) -> EnsembleRewardModel:
        """Move the reward model to the run's device, in eval mode."""
        placed: EnsembleRewardModel = model.to(self.device).eval()
        return placed

    def scorer(self, name: str, model: EnsembleRewardModel) -> Scorer:
        """A scorer that reads texts as the model in the folder `name`, up to `config.max_length` or its own limit."""
        config, tokenizer = self.config, self.tokenizers[name]
        return Scorer(model, tokenizer, batch_tokens=config.batch_tokens, max_length=config.max_length, progress=False)

    def features(self, name: str, model: EnsembleRewardModel, pairs: Sequence[PreferencePair]) -> Sides:
        """Features [P, F] of chosen and of rejected, on the run's device; each distinct text is computed once."""
        return self.read(name, model, pairs)[0]

    def read(self, name: str, model: EnsembleRewardModel, pairs: Sequence[PreferencePair]) -> tuple[Sides, Truncation]:
        """`features`, and the truncation of the texts."""
        texts, names = both_sides(pairs), names_of_sides(pairs)
        scorer = self.scorer(name, model)
        found = compute_features(scorer, texts, self.feature_folder, self.progress, names)
        chosen, rejected = (side.to(self.device) for side in found.features.split(len(pairs)))
        same = (chosen == rejected).all(dim=1)
        return (chosen, rejected), Truncation(int(found.truncated.sum()), 2 * len(pairs), int(same.sum()))

    def note_truncation(self, train: Truncation, held_out: Truncation, max_length: int | None) -> None:
        """Record in data.json how many texts lost their beginning, and warn.

        Raises:
            ValueError: if the two texts of every training pair are the same to the model.
        """
        texts, of, same = (a + b for a, b in zip(train, held_out, strict=True))
        found = {"texts": texts, "of": of, "max_length": max_length, "same_pairs": same}
        if texts and self.counts.get("truncated") != found:  # once, not in each stage
            logger.warning("data: %s", truncated_texts(texts, of))
        self.counts["truncated"] = found
        atomic_write_json(self.folder / "data.json", self.counts)
        if train.same == len(self.train):
            key = "max_length" if train.texts else "data"
            where = f" in the last {max_length} tokens, all that the model reads" if train.texts else ""
            raise ValueError(
                f"{key}: expected pairs whose two texts differ{where}, got {train.same} training pairs that do not"
            )

    @property
    def feature_folder(self) -> Path:
        """The folder of cached features."""
        return self.config.feature_cache or self.folder / "features"

    def margins(self, pairs: list[PreferencePair]) -> Tensor | None:
        """[P] margins on the run's device, 0 for a pair without one; None if no pair has one."""
        if all(pair.margin is None for pair in pairs):
            return None
        return torch.tensor([pair.margin or 0.0 for pair in pairs], device=self.device)

    def prompts(self, pairs: list[PreferencePair]) -> Tensor:
        """[P] int64 labels, equal for pairs of one prompt, on the run's device."""
        return group_labels(pair.prompt_key for pair in pairs).to(self.device)

    def save(
        self, name: str, model: EnsembleRewardModel, head: EnsembleHead, fit: dict[str, Any] | None = None
    ) -> None:
        """Save `head` on the model's trunk, with the tokeniser and how the head was fitted, in the folder `name`,
        unless that exists."""
        target = self.folder / name
        if target.exists():
            return
        whole = with_head(model, head)
        with atomic_folder(target) as folder:
            whole.save_pretrained(folder)
            self.tokenizers[name].save_pretrained(folder)
            if fit is not None:
                atomic_write_json(folder / FIT_FILE, fit)


@torch.no_grad()
def _probe(model: EnsembleRewardModel) -> None:
    """Read two tokens. Raises ValueError if the trunk's layers pass on states that the taps cannot read."""
    ids = torch.ones(1, 2, dtype=torch.int64, device=model.get_input_embeddings().weight.device)
    model.features(ids, None, ids[:, 0])


def with_head(model: EnsembleRewardModel, head: EnsembleHead, trunk: Any = None) -> EnsembleRewardModel:
    """Put `head` on the model's trunk, or on `trunk`; the result reads texts as the model does."""
    reading = ("pooling", "append_eos", "max_score_length", "skip_token_id", "taps", "logprob_skips")
    options = {name: getattr(model.config, name) for name in reading} | {"lm_head": model.lm_head}
    return EnsembleRewardModel.from_trunk(model.model if trunk is None else trunk, head=head, **options)


def _tokenizers(config: TrainConfig) -> dict[str, Any]:
    """Folder of the run -> the tokeniser of the model in it; each distinct one is loaded once."""
    policy = ("model", config.model)
    reward = policy if config.start is None else ("pet.start", config.start)
    wanted = {"stage1": policy if config.stage1 is None else ("stage1", config.stage1), "model": reward}
    wanted |= {"start": reward} | ({"policy": policy} if config.stage == "pet" else {})
    loaded: dict[str, Any] = {}
    for key, name in wanted.values():
        if name not in loaded:
            loaded[name] = load_tokenizer(key, name)
    return {folder: loaded[name] for folder, (_, name) in wanted.items()}
