"""What the vLLM plugin promises, as far as it needs no vLLM: refusals, names of weights, the output, the scorer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, GPT2Config, LlamaConfig, PreTrainedConfig

from prudent import EnsembleRewardConfig, EnsembleRewardModel, Scorer
from prudent.engine.likelihood import LanguageHead, LogitRule
from prudent.engine.taps import capturing, layers_of
from prudent.rlhf.doors.vector_dialects import scores_of_vector
from prudent.rlhf.doors.vllm import contract, taps
from prudent.rlhf.doors.vllm.scorer import heads_of, is_ours, open_scorer, read_tensors, served_ids

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(**given: Any) -> LlamaConfig:
    return LlamaConfig(vocab_size=32, max_position_embeddings=64, **SIZES, **given)


def config(trunk: PreTrainedConfig | None = None, **given: Any) -> EnsembleRewardConfig:
    return EnsembleRewardConfig(text_config=trunk or llama(), num_heads=3, **given)


class TestWhatIsServed:
    def test_a_decoder_whose_heads_read_the_last_token(self) -> None:
        contract.check_servable(config(), 64)
        contract.check_servable(config(skip_token_id=0, aggregation="tradeoff:0.4,centre=batch"), 64)

    @pytest.mark.parametrize(
        ("model", "what"),
        [
            (config(BertConfig(**SIZES)), "encoder 'bert': serve it with `prudent serve`"),
            (config(llama(is_causal=False)), "a bidirectional 'llama'"),
            (config(aggregation="tradeoff:0.4,worst=batch"), "scores each text alone.*--hf-overrides"),
        ],
    )
    def test_another_is_refused_in_one_sentence_that_says_what_to_do(
        self, model: EnsembleRewardConfig, what: str
    ) -> None:
        with pytest.raises(ValueError, match=f"(?s)^EnsembleRewardModel in vLLM: expected .*{what}"):
            contract.check_servable(model, 64)

    def test_frequencies_that_follow_the_length_limit_it(self) -> None:
        """vLLM chooses them once, by max_model_len; transformers for each batch."""
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        model = config(llama(rope_parameters=rope))
        contract.check_servable(model, 64)
        with pytest.raises(ValueError, match=r"expected max_model_len of at most 64, got 65, .*--max-model-len 64"):
            contract.check_servable(model, 65)


class TestWeights:
    @pytest.mark.parametrize(
        "trunk", [llama(), GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=64)]
    )
    def test_the_trunk_gets_the_names_of_its_causal_language_model(
        self, trunk: PreTrainedConfig, tmp_path: Path
    ) -> None:
        """vLLM's loaders know these, with each family's own prefix."""
        language_model = AutoModelForCausalLM.from_config(trunk)
        model = EnsembleRewardModel.from_trunk(language_model, num_heads=3)
        model.save_pretrained(tmp_path)
        head: dict[str, torch.Tensor] = {}
        weights = read_tensors(str(tmp_path), "").items()
        named = dict(contract.split_weights(weights, head, contract.causal_prefix(model.config)))
        own = {name: value for name, value in language_model.state_dict().items() if name != "lm_head.weight"}
        assert named.keys() == own.keys()
        assert all(torch.equal(named[name], value) for name, value in own.items())
        assert head.keys() == model.score.state_dict().keys()

    @pytest.mark.parametrize("tied", [True, False])
    def test_the_language_model_head_is_kept_for_its_tap(self, tied: bool, tmp_path: Path) -> None:
        language_model = AutoModelForCausalLM.from_config(llama(tie_word_embeddings=tied))
        EnsembleRewardModel.from_trunk(language_model, taps=["last:-1", "logprob"]).save_pretrained(tmp_path)
        weight = torch.zeros(32, 16)
        weights = list(read_tensors(str(tmp_path), "").items())
        for order in (weights, weights[::-1]):
            named = dict(contract.split_weights(order, {}, "model.", weight.zero_()))
            assert torch.equal(weight, language_model.lm_head.weight)
            assert "model.embed_tokens.weight" in named
        with pytest.raises(ValueError, match=r"expected lm_head.weight or embed_tokens.weight, got none"):
            list(contract.split_weights([("model.norm.weight", torch.zeros(16))], {}, "model.", weight))

    def test_a_tensor_of_neither_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"expected tensors model.* and score.*, got lm_head.weight"):
            list(contract.split_weights([("lm_head.weight", torch.zeros(1))], {}, "model."))

    def test_the_head_is_loaded_whole_or_refused(self) -> None:
        head, other = contract.new_head(config(trust_directions=2)), contract.new_head(config(trust_directions=2))
        other.shift.fill_(3.0)
        state = other.state_dict()
        assert contract.load_head(head, state) == {f"score.{name}" for name in state}
        assert torch.equal(head.shift, other.shift)
        del state["trust_mean"]
        with pytest.raises(ValueError, match=r"score.trust_mean: expected \[16\], got none"):
            contract.load_head(head, state)
        with pytest.raises(ValueError, match=r"score.bias: expected \[6\], got \[2\]"):
            contract.load_head(head, {**other.state_dict(), "bias": torch.zeros(2)})

    def test_the_reward_of_a_row_does_not_depend_on_the_others(self) -> None:
        head = contract.new_head(config(aggregation="tradeoff:0.4,centre=batch"))
        rows = torch.randn(5, 16)
        assert torch.equal(head(rows).reward[:1], head(rows[:1]).reward)


class TestOutput:
    @pytest.mark.parametrize("directions", [None, 2])
    def test_the_reward_is_last_and_the_length_says_whether_there_is_a_distance(self, directions: int | None) -> None:
        head = contract.new_head(config(trust_directions=directions))
        output = head(torch.randn(4, 16))
        table = contract.vectors(output)
        assert table.shape == (4, 7 + (directions is not None))
        for row, vector in enumerate(table.tolist()):
            found = scores_of_vector(vector, "vector")
            assert found["reward"] == float(output.reward[row])
            assert found["mean"] == output.mean[row].tolist()
            assert found["std"] == output.std[row].tolist()
            assert ("distance" in found) == (output.distance is not None)
        back = heads_of(list(table), 3, measures=output.distance is not None)
        assert torch.equal(back.mean, output.mean)
        assert torch.equal(back.std, output.std)
        assert (back.distance is None) == (output.distance is None)

    def test_tokens_that_the_heads_skip_are_left_away_at_the_end(self) -> None:
        """The hidden state of the token that they read is that of the shorter text."""
        assert contract.without_skipped([1, 0, 2, 0, 0], 0) == [1, 0, 2]
        assert contract.without_skipped([0, 0], 0) == [0]
        assert contract.without_skipped([1, 0], None) == [1, 0]


@pytest.fixture(scope="module")
def folder(tiny_chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("contract") / "model"
    torch.manual_seed(2)
    EnsembleRewardModel.from_trunk(str(tiny_chat_folder), num_heads=3, skip_token_id=3).save_pretrained(target)
    AutoTokenizer.from_pretrained(tiny_chat_folder).save_pretrained(target)
    return target


class TestScorer:
    """`open_scorer` with the model's own forward pass between `read` and `combine`, in vLLM's place."""

    def opened(self, folder: Path, max_model_len: int = 128) -> Scorer:
        found = EnsembleRewardConfig.from_pretrained(folder)
        given: dict[str, Any] = {"model": str(folder), "tokenizer": str(folder), "revision": None}
        return open_scorer(SimpleNamespace(hf_config=found, max_model_len=max_model_len, **given))

    @pytest.mark.parametrize("aggregation", [None, "min", "uwo:0.5"])
    def test_reads_and_combines_as_the_whole_model_does(self, folder: Path, aggregation: str | None) -> None:
        model = EnsembleRewardModel.from_pretrained(folder)
        whole = Scorer(model, AutoTokenizer.from_pretrained(folder), progress=False)
        items = [{"prompt": "my day", "response": "good food"}, "the film was bad", [5, 3, 3]]
        opened = self.opened(folder)
        rows = []
        for item in items:
            ids = served_ids(opened, opened.read(item).ids)
            assert ids[-1] != 3
            with torch.no_grad():
                rows.append(contract.vectors(model.score(model.features(torch.tensor([ids]))))[0])
        scores = opened.combine(heads_of(rows, 3, measures=False), aggregation=aggregation)
        assert scores.reward == pytest.approx(whole.score(items, aggregation=aggregation).reward, abs=1e-6)

    def test_a_shorter_limit_of_vllm_truncates_as_scorer_truncates(self, folder: Path) -> None:
        assert self.opened(folder).max_length == 128
        short = self.opened(folder, 8)
        assert short.read("my day " * 20).ids == self.opened(folder).read("my day " * 20).ids[-8:]

    def test_another_model_is_left_to_vllm(self, folder: Path, tiny_chat_folder: Path) -> None:
        assert is_ours(str(folder), None)
        assert not is_ours(str(tiny_chat_folder), None)


class TestTaps:
    """`taps` on the states that transformers gives, in vLLM's place, equals the model's own features."""

    IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 0, 0]])

    @pytest.fixture(params=[["last:-1", "mean:1", "logprob"], ["mean:1", "last:1"], ["last:0", "last:-1"]])
    def model(self, request: pytest.FixtureRequest) -> EnsembleRewardModel:
        torch.manual_seed(3)
        language_model = AutoModelForCausalLM.from_config(llama()).eval()
        given: dict[str, Any] = {"num_heads": 3, "skip_token_id": 0, "logprob_skips": [7]}
        return EnsembleRewardModel.from_trunk(language_model, taps=request.param, **given)

    def states(self, model: EnsembleRewardModel, layers: tuple[int, ...]) -> torch.Tensor:
        """[T, C D]."""
        with torch.no_grad(), capturing(model.model, layers) as inner:
            output = model.model(input_ids=self.IDS).last_hidden_state
        return torch.cat([output[0], *(inner[layer][0] for layer in layers)], dim=1)

    @pytest.mark.parametrize("start", [0, 4, 9])
    @pytest.mark.parametrize("passes", [[10], [3, 7], [1] * 10])
    def test_one_pass_or_many(self, model: EnsembleRewardModel, start: int, passes: list[int]) -> None:
        layers = taps.inner_layers(model.config.parsed_taps(), layers_of(model.config.text_config))
        reads = model.config.reads_response
        logprob = model.config.reads_logprob
        span = taps.span_of(self.IDS[0].tolist(), start if reads else None, 0, logprob=logprob)
        kept: taps.Kept = []
        place = 0
        for rows in self.states(model, layers).split(passes):
            assert taps.gathered(kept, span) is None or place > span.end - 1
            taps.keep(kept, place, rows, span)
            place += len(rows)
        assert sum(len(rows) for _, rows in kept) == span.end - span.first
        whole = taps.gathered(kept, span)
        assert whole is not None
        head = None
        if logprob:
            assert model.lm_head is not None
            head = LanguageHead(model.lm_head.weight, LogitRule(), [7])
        found = taps.read(model.config.parsed_taps(), layers, whole, self.IDS[0], span, head)
        with torch.no_grad():
            expected = model.features(self.IDS, response_start=torch.tensor([start]))
        torch.testing.assert_close(found, expected[0], atol=1e-6, rtol=1e-5)

    def test_a_state_that_vllm_had_cached_is_missed(self) -> None:
        span, kept = taps.Span(3, 4, 8), []
        taps.keep(kept, 4, torch.zeros(4, 2), span)
        assert taps.gathered(kept, span) is None
        taps.keep(kept, 3, torch.ones(5, 2), span)  # asked again, without the cache
        whole = taps.gathered(kept, span)
        assert whole is not None
        assert torch.equal(whole, torch.ones(5, 2))

    def test_an_interrupted_request_begins_anew(self) -> None:
        span, kept = taps.Span(0, 1, 6), []
        taps.keep(kept, 0, torch.zeros(4, 2), span)
        taps.keep(kept, 0, torch.ones(3, 2), span)
        taps.keep(kept, 3, torch.ones(3, 2), span)
        whole = taps.gathered(kept, span)
        assert whole is not None
        assert torch.equal(whole, torch.ones(6, 2))
