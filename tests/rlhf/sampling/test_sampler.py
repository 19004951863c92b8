"""What is drawn follows the policy's distribution and nothing else, by the engine that config and device ask for."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from prudent.rlhf.ppo.config import PPOConfig
from prudent.rlhf.ppo.rollout import draw
from prudent.rlhf.sampling import sampler
from prudent.rlhf.sampling.config import RolloutConfig
from prudent.rlhf.sampling.engines import Continuous, SharedPrefix, Static, has_continuous_batching, prompt_groups
from prudent.rlhf.sampling.prompts import Prompt
from prudent.rlhf.sampling.sampler import Faster, open_sampler
from prudent.rlhf.sampling.tokens import Sampling, draw_tokens

from .sampler_cases import a_model, a_rule, some_prompts

# -- the distribution


def test_without_top_k_and_top_p_every_token_has_its_softmax_probability() -> None:
    logits = torch.tensor([2.0, -1.0, float("-inf"), 0.5, 3.0, -7.0])
    n = 2**18
    uniform = (torch.arange(n) + 0.5) / n
    drawn = draw_tokens(logits.expand(n, -1), uniform, Sampling(1, temperature=1.5, top_k=0, top_p=1.0))
    share = torch.bincount(drawn, minlength=6) / n
    torch.testing.assert_close(share, torch.softmax(logits / 1.5, 0), rtol=0, atol=2 / n)


def test_a_token_of_no_probability_is_never_drawn() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]]).expand(3, 4)
    uniform = torch.tensor([0.0, 1 - 2**-24, 1.0])
    assert draw_tokens(logits, uniform, Sampling(1, 1.0, 0, 1.0)).tolist() == [1, 2, 2]


def test_top_p_alone_sorts_the_whole_vocabulary() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]])).expand(1000, 4)
    drawn = draw_tokens(logits, (torch.arange(1000) + 0.5) / 1000, Sampling(1, 1.0, 0, 0.7))
    share = torch.bincount(drawn, minlength=4) / 1000
    torch.testing.assert_close(share, torch.tensor([0, 2 / 3, 0, 1 / 3]), rtol=0, atol=2e-3)


# -- draw


class _Policy:
    """As much of a policy as `draw` uses."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.sampling = nullcontext


def _config(**rollout: Any) -> PPOConfig:
    rollout = {"max_new_tokens": 10, "samples_per_prompt": 3, **rollout}
    return PPOConfig(model="m", prompts="p", output="o", reward={"source": "a:b"}, rollout=rollout, seed=5)


@pytest.mark.parametrize("batch_rows", [1, 2, 3, 7, 256])
def test_what_is_drawn_does_not_depend_on_how_rows_are_batched(batch_rows: int) -> None:
    prompts = [Prompt(str(i), ids) for i, ids in enumerate(some_prompts([5, 2, 9, 5, 3]))]
    engine, policy = SharedPrefix(a_rule(10)), _Policy(a_model())
    whole = draw(engine, policy, prompts, [3, 0, 4], _config(), step=2, progress=False)
    cut = draw(engine, policy, prompts, [3, 0, 4], _config(batch_rows=batch_rows), step=2, progress=False)
    assert cut == whole
    assert whole.prompt_index == [3, 3, 3, 0, 0, 0, 4, 4, 4]
    assert whole.prompts == [prompts[i].ids for i in whole.prompt_index]
    assert len({tuple(response) for response in whole.responses}) > 5


def test_a_prompts_samples_follow_from_seed_step_and_its_number_alone() -> None:
    prompts = [Prompt(str(i), ids) for i, ids in enumerate(some_prompts([5, 2, 9]))]
    engine, policy, config = SharedPrefix(a_rule(10)), _Policy(a_model()), _config()

    def responses(*indices: int, step: int = 1, config: PPOConfig = config) -> list[list[int]]:
        return draw(engine, policy, prompts, indices, config, step, progress=False).responses

    assert responses(2, 1)[3:] == responses(1)
    assert responses(1) != responses(1, step=0)
    assert responses(1) != responses(1, config=config.model_copy(update={"seed": 6}))
    assert responses(1)[:2] == responses(1, config=_config(samples_per_prompt=2))


def test_rows_are_grouped_only_where_every_prompt_has_as_many() -> None:
    a, b = [1, 2], [3]
    assert prompt_groups([a, a, b, b]) == ([a, b], 2)
    assert prompt_groups([a, a, b]) == ([a, a, b], 1)


# -- which engine


@pytest.mark.parametrize(
    ("engine", "device", "least", "kind"),
    [
        ("auto", "cpu", 0, SharedPrefix),
        ("static", "cpu", 0, Static),
        ("continuous", "cpu", 0, Continuous),
        ("shared_prefix", "cuda", 0, SharedPrefix),
        ("auto", "cuda", 0, Faster),
        ("auto", "cuda", 2, Static),
    ],
)
def test_the_engine_follows_from_config_and_device(engine: Any, device: str, least: int, kind: type) -> None:
    if kind in (Continuous, Faster) and not has_continuous_batching():
        pytest.skip("the installed transformers has another continuous batching")
    config = RolloutConfig(engine=engine, min_new_tokens=least)
    assert isinstance(open_sampler(config, a_model(), {3}, device), kind)


@pytest.mark.parametrize(
    ("options", "stop", "message"),
    [
        ({"min_new_tokens": 65}, {3}, r"rollout.min_new_tokens: expected at most max_new_tokens \(64\), got 65"),
        ({}, set(), "stop: expected at least one token id"),
        ({"engine": "continuous", "min_new_tokens": 1}, {3}, "^rollout.*got"),
    ],
)
def test_what_cannot_be_sampled_is_refused(options: dict[str, Any], stop: set[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_sampler(RolloutConfig(**options), a_model(), stop, "cpu")


class _Engine:
    def __init__(self, name: str, seconds: float, error: Exception | None = None) -> None:
        self.name, self.seconds, self.error, self.calls = name, seconds, error, 0

    def __call__(self, model: Any, prompts: list[list[int]], uniform: torch.Tensor) -> Any:
        self.calls += 1
        if self.error is not None:
            raise self.error
        self.clock += self.seconds
        return [[self.calls]] * len(prompts), [True] * len(prompts)

    clock = 0.0


def test_the_faster_engine_is_kept_and_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow, fast = _Engine("static", 2.0), _Engine("continuous", 1.0)
    monkeypatch.setattr(sampler.time, "perf_counter", lambda: slow.clock + fast.clock)
    both = Faster(slow, fast, otherwise=slow)
    both(None, [[1]] * 10, torch.zeros(10, 4))
    both(None, [[1]] * 10, torch.zeros(10, 4))
    assert (both.name, slow.calls, fast.calls) == ("continuous", 2, 3)
    assert capsys.readouterr().err == "rollout engine: continuous (static 5 tokens/s, continuous 10 tokens/s)\n"


def test_engines_are_timed_on_a_full_batch_and_not_on_the_few_rows_of_the_first_texts() -> None:
    # for 4 rows the one is faster, for 8 the other
    class Few(_Engine):
        def __call__(self, model: Any, prompts: list[list[int]], uniform: torch.Tensor) -> Any:
            self.seconds = 0.5 if len(prompts) < 8 else 50.0
            return super().__call__(model, prompts, uniform)

    few, many, broken = Few("static", 0.0), _Engine("continuous", 1.0), _Engine("broken", 1.0, RuntimeError("no"))
    both = Faster(broken, few, many, otherwise=broken, rows=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler.time, "perf_counter", lambda: few.clock + many.clock)
        both(None, [[1]] * 4, torch.zeros(4, 4))
        assert (both.name, broken.calls, few.calls, many.calls) == ("auto", 1, 1, 0)
        both(None, [[1]] * 8, torch.zeros(8, 4))
    assert both.name == "continuous"


@pytest.mark.parametrize(
    ("prompts", "samples", "limit", "rows"), [(64, 1, 256, 64), (64, 6, 256, 252), (2, 300, 256, 256), (3, 2, 256, 6)]
)
def test_a_full_batch_has_whole_groups_where_one_fits(prompts: int, samples: int, limit: int, rows: int) -> None:
    config = RolloutConfig(samples_per_prompt=samples, batch_rows=limit)
    assert sampler.rows_at_once(config, prompts) == rows


def test_an_engine_that_fails_is_not_chosen_and_where_all_fail_another_draws() -> None:
    broken, whole = _Engine("static", 1.0, RuntimeError("no memory")), _Engine("continuous", 1.0)
    chosen = Faster(broken, whole, otherwise=broken)
    chosen(None, [[1]], torch.zeros(1, 4))
    assert chosen.name == "continuous"
    last = Faster(broken, broken, otherwise=whole)
    last(None, [[1]], torch.zeros(1, 4))
    assert last.name == "continuous"
    with pytest.raises(RuntimeError, match="no memory"):
        Faster(broken, otherwise=broken)(None, [[1]], torch.zeros(1, 4))
