"""The models that a server holds, by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ...engine import Aggregation, Scorer
from ..doors.answering import served_spec, spec_of
from ..doors.wire import DialectError, shown
from ..models.loading import load_reward
from .config import ServeConfig, named

# Tokens of a forward pass on a CPU, where more only add padding: with 8 texts of a random length at a time, a text took
# 7.4 ms of a core alone, 6.3 ms in passes of 512 tokens and 7.7 ms of 4096 (`bench.serve_load --passes`).
_CPU_TOKENS = 512


@dataclass(frozen=True)
class Served:
    """A model under a name; `aggregation` is what a request gets that asks for none."""

    name: str
    source: str
    scorer: Scorer
    aggregation: Aggregation

    @property
    def num_heads(self) -> int:
        """K."""
        return int(self.scorer.model.score.num_heads)

    def spec(self, text: str | None) -> Aggregation:
        """The aggregation that a request asks for. Raises DialectError."""
        return self.aggregation if text is None else spec_of(self.scorer, text)


class Models:
    """Served models by name; the first is the default."""

    def __init__(self, models: Iterable[Served]) -> None:
        self.by_name = {served.name: served for served in models}
        self.default = next(iter(self.by_name.values()))

    def chosen(self, query: str | None, body: str | None) -> Served:
        """The model that the query parameter names, or the body; the default if neither does. Raises DialectError.

        A body may also name a model by its folder, as verl does. One model serves any name in a body.
        """
        for name in (query, body):
            if name is None:
                continue
            found = self.by_name.get(name) or next((m for m in self.by_name.values() if m.source == name), None)
            if found is not None:
                return found
            if name is query or len(self.by_name) > 1:
                raise DialectError("model", f"one of {', '.join(self.by_name)}", shown(name), 404)
        return self.default


def load_models(config: ServeConfig) -> Models:
    """Load every model of the config. ValueError for one that cannot be loaded or scored with its aggregation."""
    models = []
    for name, source in map(named, config.model):
        reward = load_reward("model", source, append_eos=config.append_eos)
        tokens = config.batch_tokens if torch.cuda.is_available() else min(config.batch_tokens, _CPU_TOKENS)
        scorer = reward.scorer(tokens, config.max_length)
        spec = served_spec(scorer, config.aggregation)
        with torch.no_grad():
            scorer.score([[0]], aggregation=spec)  # a model that cannot run fails here, not at the first request
        models.append(Served(name, source, scorer, spec))
    return Models(models)
