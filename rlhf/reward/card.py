"""The card of a reward model: what its reward, std and distance mean, what each protects from, and how it was made."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ...engine import EnsembleRewardConfig
from ...engine.trust import LEAST_ROWS
from ...kernels import Aggregation
from ..data.reading import FILES
from ..report.card import card_text
from ..report.words import count

REWARD, SCALE, STD, DISTANCE = "Reward", "What a reward's size means", "std", "Distance"
MADE, NUMBERS, LICENCE = "How it was made", "Held-out numbers", "Licence"
LOGITS = (
    "The difference of two rewards of one prompt is a log-odds: its sigmoid is the predicted probability that the "
    "response with the first is preferred."
)
CALIBRATED = "Each head has mean 0 and standard deviation 1 on the training responses."
BEFORE_PET = "Each head had mean 0 and standard deviation 1 on the training responses before PET."
KEPT = "The scale of the heads is that of the reward model that training started from."
UNKNOWN = "Not known to `prudent {}`, which got the model from `{}`, without a card."


class Region(NamedTuple):
    """What a trust region was fitted to: `responses` to `prompts`, and where they come from.

    command: of `prudent calibrate`, which may have got the responses of the policy that will be optimised; None: the
    responses are those of the training pairs.
    """

    responses: int
    prompts: int
    command: str | None = None


class Facts(NamedTuple):
    """What a card says.

    base     the language model that the heads are on, or the model that it was made from: folder or hub name
    config   of the saved model
    scale    what a reward's size means: LOGITS, CALIBRATED, BEFORE_PET, KEPT or another sentence
    region   what the distance was fitted to; None: the model measures none
    made     Markdown: command, mode, stages, data
    numbers  Markdown: what was measured on held-out pairs
    data     names of the data, of which those on a hub are named in the metadata
    adapter  whether the folder holds a LoRA with heads, and not a whole model
    """

    base: str
    config: EnsembleRewardConfig
    scale: str
    region: Region | None
    made: str
    numbers: str
    data: Sequence[str] = ()
    adapter: bool = False


def reward_card(facts: Facts) -> str:
    """The card of a reward model's folder; the same facts give the same text."""
    config = facts.config
    return card_text(
        {
            "library_name": "peft" if facts.adapter else "prudent",
            "base_model": _hub_name(facts.base),
            "datasets": [name for name in map(_data_name, facts.data) if name],
            "tags": ["prudent", "reward-model", "rlhf", "uncertainty"],
        },
        title(config, facts.base) + ", as an adapter" * facts.adapter,
        _ADAPTER if facts.adapter else _OPENING,
        {
            REWARD: reward_section(config),
            SCALE: facts.scale,
            STD: std_section(config.num_heads),
            DISTANCE: distance_section(config, facts.region),
            MADE: facts.made,
            NUMBERS: facts.numbers,
            LICENCE: NO_LICENCE,
        },
    )


def title(config: EnsembleRewardConfig, base: str) -> str:
    """What the model is, in one line."""
    heads = "one head" if config.num_heads == 1 else f"{config.num_heads} heads"
    return f"A reward model with {heads} on {Path(base).name}"


_OPENING = """\
It says how good a response to a prompt is, and with it how far that can be trusted.

```python
from prudent import EnsembleRewardModel, Scorer
from transformers import AutoTokenizer

folder = "."  # this folder
scorer = Scorer(EnsembleRewardModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
scores = scorer.score([{"prompt": "How was it?", "response": "Lovely."}])
print(scores.reward, scores.std, scores.distance)
```"""

_ADAPTER = """\
It says how good a response to a prompt is, and with it how far that can be trusted. This folder holds the LoRA and the
heads without the language model; `prudent ppo --reward FOLDER` puts them on the policy's own."""

NO_LICENCE = """\
Not stated here. It is yours to choose, within the licences of the language model and of the data: add `license:` to the
metadata at the top. prudent then takes the card for yours, and leaves it as it is."""


def reward_section(config: EnsembleRewardConfig) -> str:
    """How the heads make one reward, and what they read."""
    spec = Aggregation.parse(config.aggregation)
    made = "that of the one head" if config.num_heads == 1 else _combined(spec)
    limit = config.max_score_length
    cut = "up to the language model's limit" if limit is None else f"up to {limit} tokens, of a longer one the last"
    eos = "with" if config.append_eos else "without"
    return f"""\
Aggregation `{spec}`: the reward is {made}{_price(spec)}.

- The heads read {_features(config)}.
- A text is read {cut}; one without a chat template {eos} an end-of-sequence token after it.
- **Protects from** nothing by itself: best-of-n and training against a reward find its errors."""


def _features(config: EnsembleRewardConfig) -> str:
    token = {"last": "the last token", "first": "the first token", "pooler": "the first token, through the pooler"}
    pooled = token[config.pooling]
    if config.taps is None:
        return f"the last layer's state at {pooled} (`features=last`)"
    said = {
        "last": "hidden state {} at " + pooled,
        "mean": "the mean over the response's tokens of hidden state {}",
        "logprob": "the mean and the least log-probability of the response's tokens under the language model",
    }
    states = [said[tap.kind].format(tap.layer) for tap in config.parsed_taps()]
    listed = " and ".join(states) if len(states) < 3 else f"{', '.join(states[:-1])}, and {states[-1]}"
    return f"{listed} (`features=[{', '.join(config.taps)}]`)"


def _combined(spec: Aggregation) -> str:
    c, nominal = spec.coefficient, _NOMINALS.get(spec.nominal, f"the mean of head {spec.nominal_head}")
    return {
        "tradeoff": f"{c:g} times {nominal} plus {1 - c:g} times the lowest head",
        "nominal": nominal,
        "mean": "the mean of the heads",
        "min": "the lowest head",
        "max": "the highest head",
        "median": "the median of the heads",
        "lcb": f"the mean of the heads less {c:g} times their standard deviation",
        "uwo": f"the mean of the heads less {c:g} times their variance",
        "softmin": f"a soft minimum of the heads (temperature {c:g})",
        "cvar": f"the mean of the lowest {100 * c:g} % of the heads, rounded up",
        "head": f"head {c:g}",
        "batch_worst": "the head that is lowest on average over the batch",
    }[spec.kind]


_NOMINALS = {
    "least_std": "the mean of the head with the least std",
    "relative_std": "the mean of the head whose std is least for that head",
    "mean": "the mean of the heads",
}


def _pays(config: EnsembleRewardConfig) -> str:
    priced = Aggregation.parse(config.aggregation).trust
    return "- **The reward** " + ("pays for it." if priced else "does not pay for it (`trust:1` would).")


def with_price(section: str, config: EnsembleRewardConfig) -> str:
    """A card's section on the distance, with the line on the price that this aggregation has."""
    return re.sub(r"(?m)^- \*\*The reward\*\* .*$", lambda _: _pays(config), section)


def _price(spec: Aggregation) -> str:
    if not spec.trust:
        return ""
    power = {1: "", 2: "the square of ", 3: "the cube of ", 4: "the fourth power of "}[spec.trust_power]
    far = "the distance" if not spec.trust_from else f"what the distance exceeds {spec.trust_from:g} by"
    return f", less a price: {spec.trust:g} times the reward's usual spread within a prompt times {power}{far}"


def std_section(heads: int) -> str:
    """What a head's std means, and what it protects from."""
    if heads == 1:
        return """\
The scores have one, but it means nothing: to learn which of two responses is better, one head needs none.

- **Protects from** nothing."""
    return """\
Each head's prediction of its own noise, learnt with its mean (BRME, arXiv 2409.15360, eq. 8). It shrinks with training,
whatever the errors are: compare stds with each other, not with an error.

- **Protects from** a response that one head alone overrates, if the aggregation reads the lowest head or the std.
- **Does not protect from** text unlike the training pairs: heads on one language model, taught on the same kind of
  text, agree about what none of them saw."""


def distance_section(config: EnsembleRewardConfig, region: Region | None) -> str:
    """What the distance means, what it was fitted to, and what it protects from."""
    if region is None:
        return (
            f"None: the model has no trust region. This fits one to {LEAST_ROWS} responses or more, without labels:\n\n"
            f"{_REFIT}"
        )
    found = f"{count(region.responses, 'response')} to {count(region.prompts, 'prompt')}"
    if region.command is None:
        source = f"the {found} of the training pairs, not to those of the policy that you will optimise. Refit it to"
        refit = f"{source} such responses, without labels:\n\n{_REFIT}"
    else:
        source = f"{found}, by\n\n{code_block(region.command)}\n\n  If they are not those of the policy that you will"
        refit = f"{source} optimise, run it again on such responses; it needs no labels."
    # docs/trust.md measures what each sees
    also, blind = ("shuffled words, ", "") if config.reads_logprob else ("", "Shuffled words hardly show. ")
    price = _pays(config)
    return f"""\
How unlike the reference responses a text is, whatever the heads say of it. 1 is the edge that 5 % of such responses lie
beyond. It knows nothing of good and bad.

- **Fitted to** {refit}
- **It reads** {_read_by_distance(config)}.
{price}
- **Protects from** text unlike the reference, such as repeated phrases, {also}code or another language, if you price
  it or watch it.
- **Does not protect from** bad text that looks like the reference's, or from a wrong order of responses within it.
  {blind}A good response of another kind is far too, and would pay the same price."""


_REFIT = "      prudent calibrate --model FOLDER --data responses.jsonl"


def code_block(text: str) -> str:
    """A code block of an item in a list."""
    return "\n".join(f"      {line}" for line in text.splitlines())


def _read_by_distance(config: EnsembleRewardConfig) -> str:
    """See `engine.trust.blocks_of_taps`."""
    kinds = {tap.kind for tap in config.parsed_taps()}
    if "mean" not in kinds:
        return "the same as the heads; a mean over the response (`features=wide`) shows foreign text better"
    if "last" not in kinds:
        return "the same as the heads"
    return "the means over the response alone" if len(kinds) == 2 else "all but the states at the last token"


def _hub_name(name: str) -> str | None:
    """`name` if it can only be a hub's, else None."""
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None


def _data_name(name: str) -> str | None:
    return None if Path(name).suffix in FILES else _hub_name(name.partition(":")[0])
