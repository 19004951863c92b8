"""EnsembleRewardConfig: defaults by the kind of trunk, JSON, and what is refused."""

from __future__ import annotations

import pytest
import transformers

from prudent.engine import EnsembleRewardConfig


def test_config_defaults_follow_the_kind_of_trunk(tiny_config):
    decoder = EnsembleRewardConfig(text_config=tiny_config("qwen3"))
    encoder = EnsembleRewardConfig(text_config=tiny_config("bert"))
    assert (decoder.pooling, decoder.append_eos, decoder.num_labels) == ("last", True, 1)
    assert (encoder.pooling, encoder.append_eos) == ("first", False)
    assert decoder.hidden_size == 32
    assert decoder.get_text_config() is decoder.text_config


def test_config_goes_through_json_unchanged(tiny_config, tmp_path):
    config = EnsembleRewardConfig(text_config=tiny_config("gpt2"), num_heads=7, aggregation="cvar:0.3,centre=batch")
    config.save_pretrained(tmp_path)
    again = EnsembleRewardConfig.from_pretrained(tmp_path)
    ignored = {"transformers_version", "_name_or_path"}
    ours, theirs = ({k: v for k, v in c.to_dict().items() if k not in ignored} for c in (config, again))
    assert ours == theirs
    assert again.text_config.n_embd == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_labels": 2}, r"num_labels: expected 1 \(one reward a row\), got 2"),
        ({"pooling": "mean"}, "pooling: expected one of last, first, pooler, got 'mean'"),
        ({"aggregation": "tradeof:0.4"}, "kind: expected one of"),
        ({"aggregation": "head:5"}, "head below 5"),
        ({"max_score_length": 0}, "max_score_length: expected a whole number above 0, got 0"),
        ({"skip_token_id": -1}, "skip_token_id: expected a token id, 0 or above, got -1"),
        ({"max_score_length": "128"}, "max_score_length: expected a whole number above 0, got '128'"),
        ({"text_config": transformers.T5Config()}, "got 't5', which is an encoder-decoder"),
    ],
)
def test_a_config_that_makes_no_reward_model_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EnsembleRewardConfig(**options)
