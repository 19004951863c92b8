"""The tap logprob: mean and least log-probability of a response, under every form of batch and of logits."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    CTRLConfig,
    LlamaConfig,
)

from prudent.engine import EnsembleRewardConfig, EnsembleRewardModel
from prudent.engine.likelihood import LanguageHead, LogitRule, response_logprob, special_ids

V, D = 40, 32
TAPS = ["last:-1", "mean:1", "logprob"]
END = 3


def language_model(tied: bool = True, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=V, initializer_range=0.5, tie_word_embeddings=tied, **sizes, **options)
    return AutoModelForCausalLM.from_config(config).eval()


def ids_of(*shape: int) -> torch.Tensor:
    return torch.randint(4, V, shape, generator=torch.Generator().manual_seed(1))


def wanted(model, ids: list[int], start: int, skips: tuple[int, ...] = ()) -> torch.Tensor:
    """[2], from the model's own logits."""
    logprob = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    read = [float(logprob[t - 1, ids[t]]) for t in range(max(start, 1), len(ids)) if ids[t] not in skips]
    return torch.tensor([sum(read) / len(read), min(read)]) if read else torch.zeros(2)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_it_is_the_mean_and_the_least_log_probability_however_a_batch_is_padded(tied):
    lm, ids, start = language_model(tied), ids_of(2, 10), torch.tensor([3, 9])
    model = EnsembleRewardModel.from_trunk(lm, taps=TAPS)
    assert (model.lm_head is None) is tied
    assert model.config.feature_size == model.score.hidden_size == 2 * D + 2
    want = torch.stack([wanted(lm, ids[row].tolist(), int(start[row])) for row in range(2)])
    assert (want[0, 0] > want[0, 1] + 0.1).all()
    for before, after in ((0, 0), (0, 5), (5, 0), (2, 3)):
        padded = torch.nn.functional.pad(ids, (before, after), value=7)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (before, after))
        torch.testing.assert_close(model.features(padded, mask, start)[:, -2:], want, rtol=0, atol=5e-6)


@torch.no_grad()
def test_the_ends_of_a_text_are_skipped_and_a_response_without_other_tokens_gets_zero():
    lm, ids = language_model(), ids_of(3, 8)
    ids[0, 6:] = END
    ids[1, 5:] = END
    start = torch.tensor([4, 5, 0])  # the second is nothing but its end; the third has no prompt
    model = EnsembleRewardModel.from_trunk(lm, taps=TAPS, logprob_skips=[END])
    found = model.features(ids, response_start=start)[:, -2:]
    want = torch.stack([wanted(lm, ids[row].tolist(), int(start[row]), (END,)) for row in range(3)])
    torch.testing.assert_close(found, want, rtol=0, atol=5e-6)
    assert found[1].tolist() == [0, 0]
    assert model.features(ids[:1, :1], response_start=torch.tensor([0]))[:, -2:].tolist() == [[0, 0]]


@pytest.mark.parametrize("rule", [LogitRule(), LogitRule(scale=0.25), LogitRule(softcap=2.0)])
@torch.no_grad()
def test_packed_sequences_read_their_own_tokens_alone(rule):
    lengths, start = [5, 3, 4], [2, 0, 3]
    hidden = torch.randn(sum(lengths), D, generator=torch.Generator().manual_seed(2))
    ids = ids_of(sum(lengths))
    head = LanguageHead(language_model().get_output_embeddings().weight, rule)
    response = torch.zeros(3, sum(lengths), dtype=torch.bool)
    place = torch.cat([torch.arange(n) for n in lengths])
    alone, first = [], 0
    for row, length in enumerate(lengths):
        response[row, first + start[row] : first + length] = True
        part = slice(first, first + length)
        own = torch.arange(length)[None] >= start[row]
        alone.append(response_logprob(head, hidden[None, part], ids[None, part], own))
        first += length
    packed = response_logprob(head, hidden[None], ids[None], response, place[None])
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=5e-6)
    z = hidden @ head.weight.T * rule.scale
    z = z if rule.softcap is None else rule.softcap * torch.tanh(z / rule.softcap)
    each = torch.stack([z.log_softmax(-1)[t - 1, ids[t]] for t in (2, 3, 4)])
    torch.testing.assert_close(packed[0], torch.stack([each.mean(), each.min()]), rtol=0, atol=5e-6)


def test_gradients_reach_the_states_that_predict_the_response():
    lm, ids = language_model(), ids_of(1, 8)
    model = EnsembleRewardModel.from_trunk(lm, taps=["logprob"], num_heads=1)
    embedded = model.model.embed_tokens.weight
    model.features(ids, response_start=torch.tensor([5]))[0, 0].backward()
    got = embedded.grad.clone()
    embedded.grad = None
    logprob = lm(input_ids=ids).logits[0].log_softmax(-1)
    torch.stack([logprob[t - 1, ids[0, t]] for t in (5, 6, 7)]).mean().backward()
    torch.testing.assert_close(got, embedded.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_saving_and_loading_keeps_the_head_what_is_skipped_and_the_reward(tied, tmp_path):
    model = EnsembleRewardModel.from_trunk(language_model(tied), taps=TAPS, logprob_skips=[END]).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["taps"], config["logprob_skips"]) == (["last:2", "mean:1", "logprob"], [END])
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    ids, start = ids_of(2, 10), torch.tensor([3, 9])
    assert torch.equal(loaded(ids, response_start=start).logits, model(ids, response_start=start).logits)


@torch.no_grad()
def test_a_folder_gives_the_head_that_lies_in_it(tmp_path):
    lm = language_model(tied=False)
    lm.save_pretrained(tmp_path)
    ids, start = ids_of(2, 10), torch.tensor([3, 9])
    found = EnsembleRewardModel.from_trunk(str(tmp_path), taps=["logprob"]).features(ids, response_start=start)
    torch.testing.assert_close(found, EnsembleRewardModel.from_trunk(lm, taps=["logprob"]).features(ids, None, start))


def test_what_has_no_next_token_distribution_is_refused():
    bert = BertModel(BertConfig(vocab_size=V, hidden_size=D, num_hidden_layers=1, num_attention_heads=2))
    for refused in (
        lambda: EnsembleRewardModel.from_trunk(bert, taps=["logprob"]),
        lambda: EnsembleRewardConfig(text_config=bert.config, taps=["mean:1", "logprob"]),
    ):
        with pytest.raises(ValueError, match=r"taps: expected states alone of an encoder, .* got logprob"):
            refused()
    with pytest.raises(ValueError, match="expected a causal language model with a linear head, got LlamaModel"):
        EnsembleRewardModel.from_trunk(language_model(tied=False).base_model, taps=["logprob"])
    with pytest.raises(ValueError, match="response_start: expected where each response begins"):
        EnsembleRewardModel.from_trunk(language_model(), taps=["logprob"])(ids_of(1, 4))


def ctrl(**options):
    torch.manual_seed(0)
    config = CTRLConfig(vocab_size=V, n_embd=D, dff=48, n_layer=2, n_head=4, n_positions=64, **options)
    return AutoModelForCausalLM.from_config(config).eval()


def scaled_for_each_token():
    lm = language_model(tied=False)
    lm.lm_head.register_forward_hook(lambda _, __, logits: logits * torch.linspace(0.5, 2, V))
    return lm


def untied_in_spite_of_its_configuration():
    lm = language_model(tied=False)
    lm.config.tie_word_embeddings = True
    return lm


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (ctrl, "from_trunk: taps: expected a language-model head without a bias, got one in CTRLLMHeadModel"),
        (
            scaled_for_each_token,
            "expected logits that are the last hidden states times .* got others",
        ),
        (untied_in_spite_of_its_configuration, "expected a head that shares the embeddings' weights, .* got other"),
    ],
)
def test_a_head_whose_log_probabilities_would_be_wrong_is_refused_also_if_it_shares_the_embeddings(make, message):
    with pytest.raises(ValueError, match=message):
        EnsembleRewardModel.from_trunk(make(), taps=["logprob"])
    EnsembleRewardModel.from_trunk(make(), taps=["mean:1"])


@torch.no_grad()
def test_a_configuration_that_does_not_say_whether_the_head_is_tied_has_one_of_its_own():
    lm, ids, start = language_model(tied=False), ids_of(2, 10), torch.tensor([3, 9])
    want = EnsembleRewardModel.from_trunk(lm, taps=["logprob"]).features(ids, response_start=start)
    del lm.config.tie_word_embeddings
    torch.testing.assert_close(EnsembleRewardModel.from_trunk(lm, taps=["logprob"]).features(ids, None, start), want)


def test_a_given_head_that_does_not_fit_or_that_nothing_reads_is_refused():
    base, taps = language_model(tied=False).base_model, ["logprob"]
    with pytest.raises(ValueError, match=r"lm_head: expected weight \[V, 32\], got \[9, 7\]"):
        EnsembleRewardModel.from_trunk(base, taps=taps, lm_head=torch.nn.Linear(7, 9))
    with pytest.raises(ValueError, match=r"lm_head: expected none, because the trunk's embeddings are its head"):
        EnsembleRewardModel.from_trunk(language_model().base_model, taps=taps, lm_head=torch.nn.Linear(D, V))


def test_special_and_added_tokens_are_skipped():
    class Tokenizer:
        all_special_ids = (2, 0)

        @staticmethod
        def get_added_vocab():
            return {"<think>": 9, "<end>": 0}

    assert special_ids(Tokenizer()) == [0, 2, 9]
