"""Stop rules: what they say, when they fire, and what they refuse."""

from __future__ import annotations

import math

import pytest

from prudent.rlhf.ppo.config import PPOConfig, RewardConfig
from prudent.rlhf.ppo.set_up import unmeasured
from prudent.rlhf.ppo.stop import METRICS, SHORT, Fired, StopRules, parse_rule


def _first_fired(rules: StopRules, name: str, values: list[float]) -> Fired | None:
    for step, value in enumerate(values):
        fired = rules.observe(step, {name: value})
        if fired is not None:
            return fired
    return None


def test_a_rule_is_a_metric_a_bound_a_number_of_steps_and_an_action() -> None:
    rule = parse_rule("disagreement > 3x for 5 then rollback")
    assert rule.metric == "reward/disagreement"
    assert (rule.compare, rule.value, rule.relative, rule.steps, rule.rollback) == (">", 3.0, True, 5, True)
    plain = parse_rule("  text/length   <=  4.5e1 ")
    assert (plain.metric, plain.compare, plain.value, plain.relative) == ("text/length", "<=", 45.0, False)
    assert (plain.steps, plain.rollback) == (1, False)
    assert parse_rule("kl>20 for 3 steps then stop").steps == 3


def test_every_short_name_stands_for_a_metric_that_is_logged() -> None:
    assert set(SHORT.values()) <= set(METRICS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kl", "expected NAME > VALUE for STEPS"),
        ("kl > lots", "expected NAME > VALUE for STEPS"),
        ("kl > 3 for 5 then explode", "expected NAME > VALUE for STEPS"),
        ("kl == 3", "expected NAME > VALUE for STEPS"),
        ("disagrement > 3", "did you mean 'disagreement'"),
        ("beauty > 3", "the metrics are disagreement, gap, std"),
        ("kl > 3 for 0", "at least 1 step"),
        ("kl > 0x", "above 0 before x"),
        ("kl > 1e999", "a finite number"),
        ("kl > 3x", "a number without x in 'kl > 3x', because kl/sequence starts at 0, got 3x"),
        ("kl/token >= .5x for 2", "because kl/token starts at 0"),
        ("kl/chi2 > 2x", "because kl/chi2 starts at 0"),
    ],
)
def test_text_that_is_no_rule_is_refused_with_the_form(text: str, said: str) -> None:
    with pytest.raises(ValueError, match="stop_when") as error:
        parse_rule(text)
    assert said in str(error.value)


def test_a_rule_fires_after_so_many_steps_in_a_row() -> None:
    rules = StopRules(["kl > 2 for 3"])
    fired = _first_fired(rules, "kl/sequence", [3, 3, 1, 3, 4, 5, 6])
    assert fired is not None
    assert (fired.since, fired.step, fired.value) == (3, 5, 5)
    assert str(fired) == "'kl > 2 for 3' held from step 3 to 5, where kl/sequence was 5"


def test_x_multiplies_the_first_finite_value() -> None:
    rules = StopRules(["disagreement >= 3x for 2"])
    fired = _first_fired(rules, "reward/disagreement", [math.nan, 0.5, 1.4, 1.5, 1.6])
    assert fired is not None
    assert fired.since == 3  # 3 x 0.5, the first that was a number


def test_nan_ends_a_row_and_infinity_is_beyond_every_bound() -> None:
    assert _first_fired(StopRules(["kl > 2 for 2"]), "kl/sequence", [3, math.nan, 3, math.nan]) is None
    assert _first_fired(StopRules(["kl > 2 for 2"]), "kl/sequence", [3, math.inf]) is not None


def test_a_start_that_has_no_multiples_is_refused_at_the_first_step() -> None:
    with pytest.raises(ValueError, match="give a number without x; to continue, use --resume with another stop_when"):
        StopRules(["gap > 3x"]).observe(0, {"reward/gap": 0.0})


def test_a_metric_that_the_run_does_not_measure_is_refused_with_those_it_does() -> None:
    said = "does not measure; it measures kl/sequence, text/length; to continue, use --resume with another stop_when"
    with pytest.raises(ValueError, match=said):
        StopRules(["gap > 3"]).observe(0, {"text/length": 1.0, "kl/sequence": 0.0})


def test_a_rule_over_what_the_run_cannot_have_is_refused_with_what_would_give_it() -> None:
    rules = StopRules(["kl > 9", "gold/mean < 0 for 2"])
    rules.refuse({})
    with pytest.raises(
        ValueError, match=r"^stop_when: 'gold/mean < 0 for 2' watches gold/mean, which needs a gold scorer"
    ):
        rules.refuse({"gold/mean": "a gold scorer"})


def test_a_rule_over_foreign_text_needs_a_reward_that_measures_the_distance() -> None:
    rules = StopRules(["foreign > 0.2 for 3 then rollback"])
    config = PPOConfig(model="m", prompts="p", output="o", reward=RewardConfig(source="r"))
    rules.refuse(unmeasured(config, 5, distance=True))
    with pytest.raises(ValueError, match=r"watches text/foreign, which needs a reward model with a trust region"):
        rules.refuse(unmeasured(config, None, distance=False))
    fired = _first_fired(rules, "text/foreign", [0.1, 0.3, 0.3, 0.25])
    assert fired is not None
    assert (fired.since, fired.rule.rollback) == (1, True)


def test_the_first_rule_to_fire_is_reported() -> None:
    rules = StopRules(["length > 5 for 4", "kl > 2 for 2 then rollback"])
    assert rules.rolls_back
    assert rules.observe(0, {"text/length": 6, "kl/sequence": 1}) is None
    assert rules.bad_since is None  # only rules that roll back need a checkpoint from before
    assert rules.observe(1, {"text/length": 6, "kl/sequence": 3}) is None
    assert rules.bad_since == 1
    fired = rules.observe(2, {"text/length": 6, "kl/sequence": 3})
    assert fired is not None
    assert fired.rule.rollback


def test_a_resumed_run_counts_on() -> None:
    texts = ["disagreement > 2x for 3"]
    values = [1.0, 3.0, 3.0, 3.0]
    first = StopRules(texts)
    for step in range(2):
        first.observe(step, {"reward/disagreement": values[step]})
    second = StopRules(texts)
    second.load_state(first.state())
    assert second.observe(2, {"reward/disagreement": values[2]}) is None
    fired = second.observe(3, {"reward/disagreement": values[3]})
    assert fired is not None
    assert fired.since == 1


def test_on_resume_an_old_rule_counts_on_and_a_new_one_starts_without_state() -> None:
    old, added = "length > 5 for 3", "disagreement > 2x for 2"
    first = StopRules([old, "gap > 9"])
    for step in range(2):
        first.observe(step, {"text/length": 6, "reward/gap": 1.0, "reward/disagreement": 1.0})
    second = StopRules([added, old])
    second.load_state(first.state())
    assert second.state() == {old: {"start": None, "since": 0}, added: {"start": None, "since": None}}
    fired = second.observe(2, {"text/length": 6, "reward/disagreement": 4.0})
    assert fired is not None
    assert (fired.rule.text, fired.since) == (old, 0)
    for step, disagreement in ((3, 8.0), (4, 8.1)):  # of 4, where the rule began
        fired = second.observe(step, {"text/length": 1, "reward/disagreement": disagreement})
        assert fired is None
    assert second.observe(5, {"text/length": 1, "reward/disagreement": 8.1}) is not None
