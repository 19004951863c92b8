"""Batched sampling: the shared prompt changes nothing but the speed, and the features are what the scorer computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prudent.engine import EnsembleRewardModel, Scorer
from prudent.engine.taps import parse_taps
from prudent.rlhf.sampling import shared_prefix
from prudent.rlhf.sampling.shared_prefix import Sampled, sample_batch
from prudent.rlhf.sampling.stored import read_again
from prudent.rlhf.sampling.tokens import Rule, Sampling, draw_tokens
from prudent.rlhf.sampling.turn import Turn


def _random_model(model_type: str) -> Any:
    from transformers import AutoConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    if model_type == "gpt2":
        sizes, heads = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40}, {}
    if model_type == "gpt_neox":
        heads = {"num_attention_heads": 4}
    torch.manual_seed(1)
    ids = {"bos_token_id": 0, "eos_token_id": 3, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **heads, **ids))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def _run(
    model: Any, prompts: torch.Tensor, uniform: torch.Tensor, sampling: Sampling, stop: set[int], closing: list[int]
) -> Sampled:
    rule = Rule(sampling, 0, stop)
    *steps, result = sample_batch(model, prompts.tolist(), uniform.shape[1], uniform.flatten(0, 1), rule, closing)
    assert isinstance(result, Sampled)
    assert sum(steps) == sum(len(t) for t in result.tokens)
    return result


def _said_by_some(model: Any, prompts: torch.Tensor, uniform: torch.Tensor, sampling: Sampling) -> set[int]:
    """A token that some responses hold and some do not, to stop at: a random model seldom says any given one."""
    said = _run(model, prompts, uniform, sampling, set(), [3]).tokens
    return {
        min((token for row in said for token in row), key=lambda t: abs(sum(t in row for row in said) - len(said) / 2))
    }


def _by_hand(
    model: Any, prompt: list[int], uniform: torch.Tensor, sampling: Sampling, stop: set[int], closing: list[int]
) -> Any:
    """One response without a cache: the whole sequence is read again for every token."""
    said: list[int] = []
    stopped = False
    with torch.no_grad():
        for u in uniform:
            logits = model(torch.tensor([prompt + said])).logits[0, -1]
            values, ids = torch.sort(logits / sampling.temperature, descending=True)
            p = torch.softmax(values[: sampling.top_k], 0)
            kept = [float(v) for v in p]
            total = 0.0
            for i, value in enumerate(kept):
                if total >= sampling.top_p:
                    kept[i] = 0.0
                total += value
            goal, running, token = float(u) * sum(kept), 0.0, 0
            for i, value in enumerate(kept):
                running += value
                if running > goal:
                    token = int(ids[i])
                    break
            said.append(token)
            if token in stop:
                stopped = True
                break
        ids = torch.tensor([prompt + said[: len(said) - stopped] + closing])
        feature = model.base_model(ids).last_hidden_state[0, -1]
    return said, stopped, feature


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "gpt2", "gpt_neox"])
def test_every_response_and_feature_equals_the_one_made_alone_without_a_cache(model_type: str) -> None:
    model = _random_model(model_type)
    prompts = torch.randint(4, 40, (3, 6), generator=torch.Generator().manual_seed(2))
    uniform = torch.rand(3, 5, 9, generator=torch.Generator().manual_seed(3))
    sampling = Sampling(9, temperature=1.3, top_k=12, top_p=0.9)
    stop = _said_by_some(model, prompts, uniform, sampling)
    result = _run(model, prompts, uniform, sampling, stop, [3, 5])
    assert any(result.stopped)
    assert not all(result.stopped)
    assert shared_prefix.shares_prefix(model, 17) == (model_type in shared_prefix.SHARING_MODELS)
    for row in range(15):
        own = prompts[row // 5].tolist(), uniform[row // 5, row % 5]
        said, stopped, feature = _by_hand(model, *own, sampling, stop, [3, 5])
        assert (result.tokens[row], result.stopped[row]) == (said, stopped)
        assert result.features is not None
        torch.testing.assert_close(result.features[row], feature, rtol=1e-4, atol=1e-4)


def test_sharing_the_prompt_gives_the_same_samples_as_copying_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _random_model("llama")
    prompts = torch.randint(4, 40, (2, 5), generator=torch.Generator().manual_seed(4))
    uniform = torch.rand(2, 40, 12, generator=torch.Generator().manual_seed(5))
    stop = _said_by_some(model, prompts, uniform, Sampling(12))
    shared = _run(model, prompts, uniform, Sampling(12), stop, [3])
    monkeypatch.setattr(shared_prefix, "SHARING_MODELS", ())
    copied = _run(model, prompts, uniform, Sampling(12), stop, [3])
    assert shared.tokens == copied.tokens
    assert shared.features is not None
    assert copied.features is not None
    torch.testing.assert_close(shared.features, copied.features, rtol=1e-4, atol=1e-4)


def test_the_model_keeps_its_own_attention_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _random_model("llama")
    before = model.config._attn_implementation
    steps = sample_batch(model, [[5, 6]], 2, torch.rand(2, 3), Rule(Sampling(3), 0, {3}), [3])
    next(steps)
    steps.close()  # as an interrupt would
    assert model.config._attn_implementation == before


def test_a_window_shorter_than_the_sequence_is_not_shared() -> None:
    model = _random_model("mistral")
    model.config.sliding_window = 16
    assert shared_prefix.shares_prefix(model, 16)
    assert not shared_prefix.shares_prefix(model, 17)


def test_draw_follows_the_truncated_distribution() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0, -1.0]]).expand(40_000, 5)
    uniform = torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    drawn = draw_tokens(logits, uniform, Sampling(1, temperature=2.0, top_k=4, top_p=0.8))
    # at temperature 2 the four likeliest have .455 .276 .167 .102: the first three reach .8
    expected = torch.softmax(torch.tensor([3.0, 2.0, 1.0]) / 2, 0)
    share = torch.bincount(drawn, minlength=5) / 40_000
    torch.testing.assert_close(share[[1, 3, 2]], expected, rtol=0, atol=0.01)
    assert share[[0, 4]].sum() == 0


def test_draw_takes_the_likeliest_token_at_the_edges_of_the_unit_interval() -> None:
    logits = torch.tensor([[1.0, 5.0, 0.0], [1.0, 5.0, 0.0]])
    below_one = 1 - 2**-24
    drawn = draw_tokens(logits, torch.tensor([0.0, below_one]), Sampling(1, top_k=50, top_p=0.5))
    assert drawn.tolist() == [1, 1]


def test_features_equal_the_scorers_on_prompt_response_and_closing_tokens(tiny_chat_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_chat_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_folder)
    turn = Turn(tokenizer, model)
    prompt = turn.prompt("it was a long day")
    uniform = torch.rand(12, 6, generator=torch.Generator().manual_seed(0))
    *_, result = sample_batch(model, [prompt], 12, uniform, Rule(Sampling(6), 0, turn.stop), turn.closing)
    assert isinstance(result, Sampled)
    assert result.features is not None
    scorer = Scorer(EnsembleRewardModel.from_trunk(model), tokenizer, progress=False)
    said = [tokens[: len(tokens) - ended] for tokens, ended in zip(result.tokens, result.stopped, strict=True)]
    ids = [prompt + tokens + turn.closing for tokens in said]
    torch.testing.assert_close(result.features, scorer.features(ids), rtol=1e-4, atol=1e-4)
    # and a text scored later is read at the same tokens
    texts = [{"prompt": "it was a long day", "response": tokenizer.decode(tokens)} for tokens in said]
    spoken = [i for i, tokens in enumerate(said) if tokens]
    assert [scorer.encode(texts[i]) for i in spoken] == [ids[i] for i in spoken]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_taps_equal_the_hidden_states_that_transformers_returns(model_type: str) -> None:
    model = _random_model(model_type)
    taps = parse_taps(["last:-1", "last:1", "mean:0", "logprob", "mean:1", "mean:2"], 2)
    prompts, closing = [[5, 6, 7], [8, 9]], [11, 12]
    uniform = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    rule = Rule(Sampling(5), 0, _said_by_some(model, torch.tensor([[5, 6, 7]]), uniform[None, :3], Sampling(5)))
    *_, result = sample_batch(model, prompts, 3, uniform, rule, closing, taps, closing)
    assert isinstance(result, Sampled)
    assert result.features is not None
    assert any(result.stopped)
    for row, (tokens, ended) in enumerate(zip(result.tokens, result.stopped, strict=True)):
        prompt = prompts[row // 3]
        ids = torch.tensor([[*prompt, *tokens[: len(tokens) - ended], *closing]])
        with torch.no_grad():
            states = model.base_model(ids, output_hidden_states=True).hidden_states
            logits = model(ids).logits[0]
        read = [t for t in range(len(prompt), ids.shape[1]) if int(ids[0, t]) not in closing]
        logprob = logits.log_softmax(-1)[[t - 1 for t in read], ids[0, read]]
        likely = torch.stack([logprob.mean(), logprob.min()]) if read else torch.zeros(2)
        expected = [states[-1][0, -1], states[1][0, -1], states[0][0, len(prompt) :].mean(0), likely]
        expected += [states[layer][0, len(prompt) :].mean(0) for layer in (1, 2)]
        torch.testing.assert_close(result.features[row], torch.cat(expected), rtol=1e-4, atol=1e-4)
        again = read_again(model, ids, torch.tensor([len(prompt)]), taps, closing)
        torch.testing.assert_close(again[0], torch.cat(expected), rtol=1e-4, atol=1e-4)
