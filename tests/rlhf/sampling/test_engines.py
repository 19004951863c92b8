"""Engines draw the same tokens from the same random numbers, whatever family, attention and batch, or refuse."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from prudent.rlhf.sampling.checks import check_logits
from prudent.rlhf.sampling.config import RolloutConfig
from prudent.rlhf.sampling.engines import Continuous, SharedPrefix, Static, has_continuous_batching
from prudent.rlhf.sampling.sampler import Faster, open_sampler

from .sampler_cases import VOCAB, a_model, a_rule, alone, numbers, some_prompts

FAMILIES = ["llama", "qwen3", "mistral", "gpt2", "gpt_neox"]  # shared prompts in the first three
ATTENTIONS = [(family, attention) for family in (*FAMILIES, "olmo2", "gemma2") for attention in ("sdpa", "eager")]
ATTENTIONS.remove(("gemma2", "sdpa"))  # which cannot cap scores


@pytest.mark.parametrize("engine", [SharedPrefix, Static])
@pytest.mark.parametrize(("family", "attention"), ATTENTIONS)
def test_every_row_gets_the_tokens_that_it_gets_alone_without_a_cache(family: str, attention: str, engine: Any) -> None:
    model, rule = a_model(family), a_rule(temperature=1.3)
    model.set_attn_implementation(attention)
    prompts, uniform = some_prompts([5, 9, 1, 6], samples=3), numbers(12, 12)
    responses, stopped = engine(rule)(model, prompts, uniform)
    assert any(stopped)
    assert not all(stopped)
    for row in range(12):
        assert (responses[row], stopped[row]) == alone(model, prompts[row], uniform[row], rule)


@pytest.mark.parametrize(("family", "attention"), [("gpt_neox", "sdpa"), ("gemma2", "eager")])
def test_a_flash_attention_reads_prompts_and_leaves_the_static_cache_to_one_that_takes_a_mask(
    family: str, attention: str
) -> None:
    model, rule, seen = a_model(family), a_rule(), []
    model.set_attn_implementation(attention)
    prompts, uniform = some_prompts([6, 6], samples=2), numbers(4, 12)
    expected = [alone(model, prompt, u, rule) for prompt, u in zip(prompts, uniform, strict=True)]

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
    model, rule = a_model(), a_rule(**options)
    prompts, uniform = some_prompts([4, 8, 8], samples=4), numbers(12, 12)
    shared, static = SharedPrefix(rule)(model, prompts, uniform), Static(rule)(model, prompts, uniform)
    assert shared == static
    assert all(len(response) > options.get("least", 0) for response in shared[0])


@pytest.mark.parametrize("engine", [SharedPrefix, Static])
def test_a_row_does_not_depend_on_its_company(engine: Any) -> None:
    model, rule = a_model(), a_rule()
    prompts, uniform = some_prompts([4, 7, 2], samples=2), numbers(6, 12)
    together = engine(rule)(model, prompts, uniform)
    for row in range(6):
        one = engine(rule)(model, prompts[row : row + 1], uniform[row : row + 1])
        assert (one[0][0], one[1][0]) == (together[0][row], together[1][row])
    again = engine(rule)(model, prompts, uniform)
    assert again == together


@pytest.mark.parametrize("engine", [SharedPrefix, Static])
@pytest.mark.parametrize("lengths", [[6], [5, 3]])
def test_heads_that_share_no_keys_are_drawn_from_alike(lengths: list[int], engine: Any) -> None:
    model, rule = a_model(num_key_value_heads=4), a_rule()
    prompts, uniform = some_prompts(lengths, samples=6), numbers(6 * len(lengths), 12)
    expected = [alone(model, prompt, u, rule) for prompt, u in zip(prompts, uniform, strict=True)]
    assert list(zip(*engine(rule)(model, prompts, uniform), strict=True)) == expected


@pytest.mark.parametrize("engine", [SharedPrefix, Static])
def test_the_adapters_that_are_on_take_part(engine: Any) -> None:
    from peft import LoraConfig, get_peft_model

    plain = a_model()
    prompts, uniform, rule = some_prompts([4, 7]), numbers(2, 12), a_rule()
    before = engine(rule)(plain, prompts, uniform)
    wrapped = get_peft_model(plain, LoraConfig(r=4, target_modules="all-linear"), adapter_name="actor").eval()
    assert engine(rule)(wrapped, prompts, uniform) == before  # a fresh adapter adds nothing
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    expected = [alone(wrapped, prompt, u, rule) for prompt, u in zip(prompts, uniform, strict=True)]
    got = engine(rule)(wrapped, prompts, uniform)
    assert list(zip(*got, strict=True)) == expected
    assert got != before
    with wrapped.disable_adapter():
        assert engine(rule)(wrapped, prompts, uniform) == before


@pytest.mark.parametrize("engine", [SharedPrefix, Static])
def test_a_response_has_its_stop_token_and_is_never_empty(engine: Any) -> None:
    model = a_model()
    prompts, uniform = some_prompts([3, 6]), numbers(2, 8)
    everything = set(range(VOCAB))
    assert engine(a_rule(8, tuple(everything)))(model, prompts, uniform)[1] == [True, True]
    assert [len(r) for r in engine(a_rule(8, tuple(everything)))(model, prompts, uniform)[0]] == [1, 1]
    cut, stopped = engine(a_rule(8, stop=(VOCAB - 1,), top_k=1))(model, prompts, uniform)
    assert (stopped, [len(r) for r in cut]) == ([False, False], [8, 8])
    assert [len(r) for r in engine(a_rule(1))(model, prompts, uniform[:, :1])[0]] == [1, 1]


def test_the_model_keeps_its_own_attention_afterwards() -> None:
    model = a_model()
    before = model.config._attn_implementation
    for engine in (SharedPrefix, Static):
        with pytest.raises(IndexError):
            engine(a_rule())(model, [[VOCAB + 5]], numbers(1, 4))
        engine(a_rule())(model, [[5]], numbers(1, 4))
        assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gemma2", {"final_logit_softcapping": 2.0, "sliding_window": 64}), ("cohere", {"logit_scale": 0.25})],
)
def test_capped_and_scaled_logits_are_drawn_from(family: str, changes: dict[str, Any]) -> None:
    model = a_model(family, **changes)
    check_logits(model)
    prompts, uniform, rule = some_prompts([4, 7], samples=2), numbers(4, 8), a_rule(8)
    responses, stopped = SharedPrefix(rule)(model, prompts, uniform)
    for row in range(4):
        assert (responses[row], stopped[row]) == alone(model, prompts[row], uniform[row], rule)


def test_a_model_that_does_more_to_its_logits_is_refused() -> None:
    model = a_model()
    head = model.get_output_embeddings()
    model.forward = lambda input_ids, **_: SimpleNamespace(
        logits=head(model.base_model(input_ids=input_ids).last_hidden_state).abs()
    )
    with pytest.raises(ValueError, match="the output layer on the last hidden state, got others from LlamaFor"):
        open_sampler(RolloutConfig(), model, {3}, "cpu")


def test_a_short_window_is_refused_by_the_static_cache_alone() -> None:
    model, prompts, uniform = a_model("mistral", sliding_window=8), some_prompts([6, 4]), numbers(2, 12)
    responses, _ = SharedPrefix(a_rule())(model, prompts, uniform)
    assert responses == [alone(model, p, u, a_rule())[0] for p, u in zip(prompts, uniform, strict=True)]
    with pytest.raises(ValueError, match=r"rollout.engine: expected shared_prefix for mistral"):
        Static(a_rule())(model, prompts, uniform)


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
    model, prompts, uniform = a_model(), some_prompts([6, 4]), numbers(2, 12)
    model.config.rope_parameters = rope
    with pytest.raises(ValueError, match=r"expected shared_prefix for llama with rope_type dynamic, .* g"):
        Static(a_rule())(model, prompts, uniform)
    assert len(SharedPrefix(a_rule())(model, prompts, uniform)[0]) == 2


# -- transformers' continuous batching, on whatever answers to its name

with_continuous = pytest.mark.skipif(
    not has_continuous_batching(), reason="the installed transformers has another continuous batching"
)


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


@with_continuous
def test_continuous_batching_is_asked_for_the_rules_and_seeded_by_the_numbers() -> None:
    seen: dict[str, Any] = {}
    model = _answering([_output(5, 3), _output(5, 6, 8)], seen)
    engine = Continuous(a_rule(3, stop=(3,), temperature=0.7, top_k=4, top_p=0.9))
    state = torch.get_rng_state()
    assert engine(model, [[1], [2, 4]], numbers(2, 3)) == ([[5, 3], [5, 6, 8]], [True, False])
    generation = seen["generation"]
    assert (generation.temperature, generation.top_k, generation.top_p) == (0.7, 4, 0.9)
    assert (generation.max_new_tokens, generation.eos_token_id, generation.do_sample) == (3, [3], True)
    assert torch.equal(torch.get_rng_state(), state)
    first = seen["noise"]
    engine(model, [[1], [2, 4]], numbers(2, 3))
    assert seen["noise"] == first
    engine(model, [[1], [2, 4]], 1 - numbers(2, 3))
    assert seen["noise"] != first


@with_continuous
@pytest.mark.parametrize("outputs", [[_output(5, 3)], [_output(5, 3), _output(4, error="cache full")], [_output()] * 2])
def test_continuous_batching_that_loses_rows_is_an_error(outputs: list[Any]) -> None:
    with pytest.raises(RuntimeError, match="continuous batching failed"):
        Continuous(a_rule(3))(_answering(outputs, {}), [[1], [2]], numbers(2, 3))


@with_continuous
def test_continuous_batching_runs_on_a_cpu_and_follows_the_policy() -> None:
    # one token from a prompt of one token: the shares of what 512 rows say against the softmax
    model = a_model()
    engine = Continuous(a_rule(1, stop=(VOCAB - 1,)))
    responses, _ = engine(model, [[5]] * 512, numbers(512, 1))
    share = torch.bincount(torch.tensor([r[0] for r in responses]), minlength=VOCAB) / 512
    with torch.no_grad():
        probability = torch.softmax(model(torch.tensor([[5]])).logits[0, -1], 0)
    deviation = (probability * (1 - probability) / 512).sqrt()
    assert float(((share - probability).abs() / (deviation + 1e-3)).max()) < 4
    assert engine(model, [[5]] * 512, numbers(512, 1))[0] == responses
    assert model.config._attn_implementation == "sdpa"


@with_continuous
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_continuous_batching_that_fails_before_its_first_row_leaves_the_model_its_attention(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.generation.continuous_batching import continuous_api

    def full(manager: Any) -> None:  # as where memory runs out while graphs are captured
        raise RuntimeError("out of memory")

    monkeypatch.setattr(continuous_api.ContinuousBatchingManager, "warmup", full)
    model, prompts, uniform = a_model(), some_prompts([4, 6]), numbers(2, 12)
    model.set_attn_implementation(attention)
    expected = SharedPrefix(a_rule())(model, prompts, uniform)
    chosen = Faster(Continuous(a_rule()), otherwise=SharedPrefix(a_rule()))
    assert chosen(model, prompts, uniform) == expected
    assert chosen.name == "shared_prefix"
    assert model.config._attn_implementation == attention
    assert SharedPrefix(a_rule())(model, prompts, uniform) == expected


@with_continuous
def test_continuous_batching_attends_as_the_policy_does_where_flash_attention_is_there() -> None:
    seen: dict[str, Any] = {}
    Continuous(a_rule(3))(_answering([_output(5, 3)], seen), [[1]], numbers(1, 3))
    assert seen["continuous_batching_config"].auto_switch_to_flash is False


@with_continuous
def test_continuous_batching_refuses_softcapped_scores_that_its_eager_attention_would_not_cap() -> None:
    model = a_model("gemma2")
    with pytest.raises(ValueError, match=r"expected shared_prefix for gemma2 .* softcapped, got continuous"):
        Continuous(a_rule())(model, some_prompts([4]), numbers(1, 4))


def test_a_transformers_without_that_continuous_batching_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prudent.rlhf.sampling.engines.has_continuous_batching", lambda: False)
    with pytest.raises(ValueError, match=r"rollout.engine: expected a transformers with Continuous.* got 5"):
        Continuous(a_rule())
