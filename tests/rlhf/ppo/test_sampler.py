"""Engines say the same from the same numbers; what is drawn follows the policy's distribution and nothing else."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from prudent.rlhf.decode import Sampling, draw_tokens
from prudent.rlhf.ppo import sampler
from prudent.rlhf.ppo.config import PPOConfig, RolloutConfig
from prudent.rlhf.ppo.engines import Continuous, Rule, SharedPrefix, Static, prompt_groups
from prudent.rlhf.ppo.prompts import Prompt
from prudent.rlhf.ppo.sampler import Faster, check_logits, draw, open_sampler

VOCAB = 40
FAMILIES = ["llama", "qwen3", "mistral", "gpt2", "gpt_neox"]  # shared prompts in the first three
ATTENTIONS = [(family, attention) for family in (*FAMILIES, "olmo2", "gemma2") for attention in ("sdpa", "eager")]
ATTENTIONS.remove(("gemma2", "sdpa"))  # which cannot cap scores


def _model(family: str = "llama", **changes: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    if family == "gpt2":
        sizes, heads = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB}, {}
    if family == "gpt_neox":
        heads = {"num_attention_heads": 4}
    torch.manual_seed(1)
    ids = {"bos_token_id": 0, "eos_token_id": 3, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **heads, **ids, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def _prompts(lengths: list[int], samples: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    distinct = [torch.randint(4, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return [prompt for prompt in distinct for _ in range(samples)]


def _uniform(rows: int, limit: int) -> torch.Tensor:
    return torch.rand(rows, limit, generator=torch.Generator().manual_seed(3))


def _rule(limit: int = 12, stop: tuple[int, ...] = (3, 7, 9), least: int = 0, **options: Any) -> Rule:
    return Rule(Sampling(limit, **{"top_k": 0, "top_p": 1.0, **options}), least, set(stop))


def _alone(model: Any, prompt: list[int], uniform: torch.Tensor, rule: Rule) -> tuple[list[int], bool]:
    """One response without a cache: the whole sequence is read again for every token."""
    said: list[int] = []
    for step, u in enumerate(uniform):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + said])).logits[:, -1].double()
        if step < rule.min_new_tokens:
            logits[:, rule.stop] = float("-inf")
        probability = torch.softmax(logits[0] / rule.sampling.temperature, 0)
        said.append(min(int((probability.cumsum(0) <= u).sum()), VOCAB - 1))
        if said[-1] in rule.stop.tolist():
            return said, True
    return said, False


@pytest.mark.parametrize("engine", [SharedPrefix, Static])
@pytest.mark.parametrize(("family", "attention"), ATTENTIONS)
def test_every_row_says_what_it_says_alone_without_a_cache(family: str, attention: str, engine: Any) -> None:
    model, rule = _model(family), _rule(temperature=1.3)
    model.set_attn_implementation(attention)
    prompts, uniform = _prompts([5, 9, 1, 6], samples=3), _uniform(12, 12)
    responses, stopped = engine(rule)(model, prompts, uniform)
    assert any(stopped)
    assert not all(stopped)
    for row in range(12):
        assert (responses[row], stopped[row]) == _alone(model, prompts[row], uniform[row], rule)


@pytest.mark.parametrize(("family", "attention"), [("gpt_neox", "sdpa"), ("gemma2", "eager")])
def test_a_flash_attention_reads_prompts_and_leaves_the_static_cache_to_one_that_takes_a_mask(
    family: str, attention: str
) -> None:
    model, rule, seen = _model(family), _rule(), []
    model.set_attn_implementation(attention)
    prompts, uniform = _prompts([6, 6], samples=2), _uniform(4, 12)
    expected = [_alone(model, prompt, u, rule) for prompt, u in zip(prompts, uniform, strict=True)]

    def flash(module: Any, query: torch.Tensor, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        seen.append(query.shape[2])
        causal = torch.full((6, 6), float("-inf")).triu(1)[None, None]
        own = sys.modules[type(module).__module__].eager_attention_forward
        return own(module, query, key, value, causal, **options)

    AttentionInterface.register("stand_in", flash)
    model.set_attn_implementation("stand_in")
    assert list(zip(*Static(rule)(model, prompts, uniform), strict=True)) == expected
    assert set(seen) == {6}
    assert model.config._attn_implementation == "stand_in"


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.8}, {"least": 6}])
def test_the_engines_agree_however_the_distribution_is_cut(options: dict[str, Any]) -> None:
    model, rule = _model(), _rule(**options)
    prompts, uniform = _prompts([4, 8, 8], samples=4), _uniform(12, 12)
    shared, static = SharedPrefix(rule)(model, prompts, uniform), Static(rule)(model, prompts, uniform)
    assert shared == static
    assert all(len(response) > options.get("least", 0) for response in shared[0])


@pytest.mark.parametrize("engine", [SharedPrefix, Static])
def test_a_row_does_not_depend_on_its_company(engine: Any) -> None:
    model, rule = _model(), _rule()
    prompts, uniform = _prompts([4, 7, 2], samples=2), _uniform(6, 12)
    together = engine(rule)(model, prompts, uniform)
    for row in range(6):
        one = engine(rule)(model, prompts[row : row + 1], uniform[row : row + 1])
        assert (one[0][0], one[1][0]) == (together[0][row], together[1][row])
    again = engine(rule)(model, prompts, uniform)
    assert again == together


@pytest.mark.parametrize("engine", [SharedPrefix, Static])
def test_the_adapters_that_are_on_take_part(engine: Any) -> None:
    from peft import LoraConfig, get_peft_model

    plain = _model()
    prompts, uniform, rule = _prompts([4, 7]), _uniform(2, 12), _rule()
    before = engine(rule)(plain, prompts, uniform)
    wrapped = get_peft_model(plain, LoraConfig(r=4, target_modules="all-linear"), adapter_name="actor").eval()
    assert engine(rule)(wrapped, prompts, uniform) == before  # a fresh adapter adds nothing
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    expected = [_alone(wrapped, prompt, u, rule) for prompt, u in zip(prompts, uniform, strict=True)]
    got = engine(rule)(wrapped, prompts, uniform)
    assert list(zip(*got, strict=True)) == expected
    assert got != before
    with wrapped.disable_adapter():
        assert engine(rule)(wrapped, prompts, uniform) == before


@pytest.mark.parametrize("engine", [SharedPrefix, Static])
def test_a_response_has_its_stop_token_and_is_never_empty(engine: Any) -> None:
    model = _model()
    prompts, uniform = _prompts([3, 6]), _uniform(2, 8)
    everything = set(range(VOCAB))
    assert engine(_rule(8, tuple(everything)))(model, prompts, uniform)[1] == [True, True]
    assert [len(r) for r in engine(_rule(8, tuple(everything)))(model, prompts, uniform)[0]] == [1, 1]
    cut, stopped = engine(_rule(8, stop=(VOCAB - 1,), top_k=1))(model, prompts, uniform)
    assert (stopped, [len(r) for r in cut]) == ([False, False], [8, 8])
    assert [len(r) for r in engine(_rule(1))(model, prompts, uniform[:, :1])[0]] == [1, 1]


def test_the_model_keeps_its_own_attention_afterwards() -> None:
    model = _model()
    before = model.config._attn_implementation
    for engine in (SharedPrefix, Static):
        with pytest.raises(IndexError):
            engine(_rule())(model, [[VOCAB + 5]], _uniform(1, 4))
        engine(_rule())(model, [[5]], _uniform(1, 4))
        assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gemma2", {"final_logit_softcapping": 2.0, "sliding_window": 64}), ("cohere", {"logit_scale": 0.25})],
)
def test_capped_and_scaled_logits_are_drawn_from(family: str, changes: dict[str, Any]) -> None:
    model = _model(family, **changes)
    check_logits(model)
    prompts, uniform, rule = _prompts([4, 7], samples=2), _uniform(4, 8), _rule(8)
    responses, stopped = SharedPrefix(rule)(model, prompts, uniform)
    for row in range(4):
        assert (responses[row], stopped[row]) == _alone(model, prompts[row], uniform[row], rule)


def test_a_model_that_does_more_to_its_logits_is_refused() -> None:
    model = _model()
    head = model.get_output_embeddings()
    model.forward = lambda input_ids, **_: SimpleNamespace(
        logits=head(model.base_model(input_ids=input_ids).last_hidden_state).abs()
    )
    with pytest.raises(ValueError, match="the output layer on the last hidden state, got others from LlamaFor"):
        open_sampler(RolloutConfig(), model, {3}, "cpu")


def test_a_short_window_is_refused_by_the_static_cache_alone() -> None:
    model, prompts, uniform = _model("mistral", sliding_window=8), _prompts([6, 4]), _uniform(2, 12)
    responses, _ = SharedPrefix(_rule())(model, prompts, uniform)
    assert responses == [_alone(model, p, u, _rule())[0] for p, u in zip(prompts, uniform, strict=True)]
    with pytest.raises(ValueError, match=r"rollout.engine: expected shared_prefix or continuous for mistral"):
        Static(_rule())(model, prompts, uniform)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        {"full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    ],
)
def test_rotary_frequencies_that_change_with_the_length_are_refused_by_the_static_cache_alone(
    rope: dict[str, Any],
) -> None:
    model, prompts, uniform = _model(), _prompts([6, 4]), _uniform(2, 12)
    model.config.rope_parameters = rope
    with pytest.raises(
        ValueError, match=r"expected shared_prefix or continuous for llama with rope_type dynamic, .* g"
    ):
        Static(_rule())(model, prompts, uniform)
    assert len(SharedPrefix(_rule())(model, prompts, uniform)[0]) == 2


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
    prompts = [Prompt(str(i), ids) for i, ids in enumerate(_prompts([5, 2, 9, 5, 3]))]
    engine, policy = SharedPrefix(_rule(10)), _Policy(_model())
    whole = draw(engine, policy, prompts, [3, 0, 4], _config(), step=2, progress=False)
    cut = draw(engine, policy, prompts, [3, 0, 4], _config(batch_rows=batch_rows), step=2, progress=False)
    assert cut == whole
    assert whole.prompt_index == [3, 3, 3, 0, 0, 0, 4, 4, 4]
    assert whole.prompts == [prompts[i].ids for i in whole.prompt_index]
    assert len({tuple(response) for response in whole.responses}) > 5


def test_a_prompts_samples_follow_from_seed_step_and_its_number_alone() -> None:
    prompts = [Prompt(str(i), ids) for i, ids in enumerate(_prompts([5, 2, 9]))]
    engine, policy, config = SharedPrefix(_rule(10)), _Policy(_model()), _config()

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
    config = RolloutConfig(engine=engine, min_new_tokens=least)
    assert isinstance(open_sampler(config, _model(), {3}, device), kind)


@pytest.mark.parametrize(
    ("options", "stop", "message"),
    [
        ({"min_new_tokens": 65}, {3}, r"rollout.min_new_tokens: expected at most max_new_tokens \(64\), got 65"),
        ({}, set(), "stop: expected at least one token id"),
        ({"engine": "continuous", "min_new_tokens": 1}, {3}, "expected 0 with engine continuous"),
    ],
)
def test_what_cannot_be_sampled_is_refused(options: dict[str, Any], stop: set[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_sampler(RolloutConfig(**options), _model(), stop, "cpu")


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
    both = Faster(slow, fast)
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
    both = Faster(broken, few, many, rows=8)
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


def test_an_engine_that_fails_is_not_chosen_and_both_failing_is_an_error() -> None:
    broken, whole = _Engine("static", 1.0, RuntimeError("no memory")), _Engine("continuous", 1.0)
    chosen = Faster(broken, whole)
    chosen(None, [[1]], torch.zeros(1, 4))
    assert chosen.name == "continuous"
    with pytest.raises(RuntimeError, match="no memory"):
        Faster(broken, broken)(None, [[1]], torch.zeros(1, 4))


# -- transformers' continuous batching, on whatever answers to its name


def _answering(outputs: list[Any], seen: dict[str, Any]) -> Any:
    def generate_batch(prompts: Any, generation_config: Any, **options: Any) -> Any:
        seen.update(options, prompts=prompts, generation=generation_config, noise=torch.rand(1).item())
        return {f"req_{i}": output for i, output in enumerate(outputs)}

    config = SimpleNamespace(_attn_implementation="sdpa")
    return SimpleNamespace(
        device=torch.device("cpu"),
        generate_batch=generate_batch,
        config=config,
        set_attn_implementation=lambda name: setattr(config, "_attn_implementation", name),
    )


def _output(*tokens: int, error: str | None = None) -> Any:
    return SimpleNamespace(generated_tokens=list(tokens), error=error)


def test_continuous_batching_is_asked_for_the_rules_and_seeded_by_the_numbers() -> None:
    seen: dict[str, Any] = {}
    model = _answering([_output(5, 3), _output(5, 6, 8)], seen)
    engine = Continuous(_rule(3, stop=(3,), temperature=0.7, top_k=4, top_p=0.9))
    state = torch.get_rng_state()
    assert engine(model, [[1], [2, 4]], _uniform(2, 3)) == ([[5, 3], [5, 6, 8]], [True, False])
    generation = seen["generation"]
    assert (generation.temperature, generation.top_k, generation.top_p) == (0.7, 4, 0.9)
    assert (generation.max_new_tokens, generation.eos_token_id, generation.do_sample) == (3, [3], True)
    assert torch.equal(torch.get_rng_state(), state)
    first = seen["noise"]
    engine(model, [[1], [2, 4]], _uniform(2, 3))
    assert seen["noise"] == first
    engine(model, [[1], [2, 4]], 1 - _uniform(2, 3))
    assert seen["noise"] != first


@pytest.mark.parametrize("outputs", [[_output(5, 3)], [_output(5, 3), _output(4, error="cache full")], [_output()] * 2])
def test_continuous_batching_that_loses_rows_is_an_error(outputs: list[Any]) -> None:
    with pytest.raises(RuntimeError, match="continuous batching failed"):
        Continuous(_rule(3))(_answering(outputs, {}), [[1], [2]], _uniform(2, 3))


def test_continuous_batching_runs_on_a_cpu_and_follows_the_policy() -> None:
    # one token from a prompt of one token: the shares of what 512 rows say against the softmax
    model = _model()
    engine = Continuous(_rule(1, stop=(VOCAB - 1,)))
    responses, _ = engine(model, [[5]] * 512, _uniform(512, 1))
    share = torch.bincount(torch.tensor([r[0] for r in responses]), minlength=VOCAB) / 512
    with torch.no_grad():
        probability = torch.softmax(model(torch.tensor([[5]])).logits[0, -1], 0)
    deviation = (probability * (1 - probability) / 512).sqrt()
    assert float(((share - probability).abs() / (deviation + 1e-3)).max()) < 4
    assert engine(model, [[5]] * 512, _uniform(512, 1))[0] == responses
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_continuous_batching_that_fails_before_its_first_row_leaves_the_model_its_attention(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.generation.continuous_batching import continuous_api

    def full(manager: Any) -> None:  # as where memory runs out while graphs are captured
        raise RuntimeError("out of memory")

    monkeypatch.setattr(continuous_api.ContinuousBatchingManager, "warmup", full)
    model, prompts, uniform = _model(), _prompts([4, 6]), _uniform(2, 12)
    model.set_attn_implementation(attention)
    expected = SharedPrefix(_rule())(model, prompts, uniform)
    chosen = Faster(SharedPrefix(_rule()), Continuous(_rule()))
    assert chosen(model, prompts, uniform) == expected
    assert chosen.name == "shared_prefix"
    assert model.config._attn_implementation == attention
    assert SharedPrefix(_rule())(model, prompts, uniform) == expected


def test_continuous_batching_attends_as_the_policy_does_where_flash_attention_is_there() -> None:
    seen: dict[str, Any] = {}
    Continuous(_rule(3))(_answering([_output(5, 3)], seen), [[1]], _uniform(1, 3))
    assert seen["continuous_batching_config"].auto_switch_to_flash is False


def test_continuous_batching_refuses_softcapped_scores_that_its_eager_attention_would_not_cap() -> None:
    model = _model("gemma2")
    with pytest.raises(ValueError, match=r"expected static or shared_prefix for gemma2 .* softcapped, got continuous"):
        Continuous(_rule())(model, _prompts([4]), _uniform(1, 4))
