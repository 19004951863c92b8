"""Families that cache states beside keys and values, or instead: sampled right, or refused before the run begins."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from prudent.rlhf.sampling.checks import caches_attention_alone, takes_padding
from prudent.rlhf.sampling.config import RolloutConfig
from prudent.rlhf.sampling.engines import Static, has_continuous_batching
from prudent.rlhf.sampling.sampler import open_sampler

from .sampler_cases import VOCAB, a_model, a_rule, alone, numbers, some_prompts

_DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_next": {**_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 16, "num_hidden_layers": 4},
    "qwen3_5_text": {**_DELTA, "num_hidden_layers": 4},
    "olmo_hybrid": {**_DELTA, "linear_num_key_heads": 4, "num_hidden_layers": 4},
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 64},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "granitemoehybrid": {
        **_MAMBA2,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 32,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mamba"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "use_mamba_kernels": False,
    },
    "minimax": {
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "block_size": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 64, "block_types": ["recurrent", "attention"]},
}
# the one keeps its state in its layers and gives no cache out, the other has no way to select rows of its cache
REFUSED = {"recurrent_gemma", "minimax"}
OLD = (
    not has_continuous_batching()
)  # one of the first releases of transformers 5, whose Mambas have caches of their own
if OLD:
    REFUSED |= {"bamba", "falcon_h1", "granitemoehybrid", "mamba", "mamba2"}


def a_hybrid(family: str) -> Any:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers has no {family}")
    return a_model(family, **FAMILIES[family])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_auto_samples_a_hybrid_as_without_a_cache_or_refuses_it(family: str) -> None:
    model, rule = a_hybrid(family), a_rule(6)
    options: dict[str, Any] = {"max_new_tokens": 6, "engine": "auto"}
    stop = set(rule.stop.tolist())
    if family in REFUSED:
        with pytest.raises(ValueError, match=rf"got {family}, which cannot be sampled from: "):
            open_sampler(RolloutConfig(**options), model, stop, "cpu")
        return
    sampler = open_sampler(RolloutConfig(**options), model, stop, "cpu")
    prompts, uniform = some_prompts([5, 9, 1, 6], samples=2), numbers(8, 6)
    responses, stopped = sampler(model, prompts, uniform)
    for row in range(8):
        assert (responses[row], stopped[row]) == alone(model, prompts[row], uniform[row], rule)


@pytest.mark.parametrize("engine", ["static", "continuous"])
def test_an_engine_that_wants_keys_and_values_is_refused_for_a_hybrid_at_the_start(engine: Any) -> None:
    model = a_hybrid("lfm2")
    with pytest.raises(ValueError, match=rf"expected shared_prefix or auto for lfm2, .* got {engine}$"):
        open_sampler(RolloutConfig(engine=engine), model, {3}, "cpu")
    assert open_sampler(RolloutConfig(), model, {3}, "cuda").name == "shared_prefix"


@pytest.mark.skipif(OLD, reason="the installed transformers' Mamba cannot be sampled from")
def test_prompts_of_one_length_share_a_batch_where_a_family_is_wrong_behind_padding() -> None:
    model, rule = a_model("mamba", state_size=8), a_rule(8)
    assert not takes_padding(model)
    assert takes_padding(a_model("gpt2"))
    sampler = open_sampler(RolloutConfig(max_new_tokens=8), model, set(rule.stop.tolist()), "cpu")
    prompts, uniform = some_prompts([4, 7, 4], samples=2), numbers(6, 8)
    responses, _ = sampler(model, prompts, uniform)
    assert responses == [alone(model, p, u, rule)[0] for p, u in zip(prompts, uniform, strict=True)]


def test_a_cache_of_attention_alone_is_told_from_others() -> None:
    assert all(caches_attention_alone(a_model(family)) for family in ("llama", "gpt2", "gemma2"))
    assert not caches_attention_alone(a_model("mamba", state_size=8))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_sampled_token_makes_transformers_warn(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model, prompts, uniform = a_model(family), some_prompts([4, 6], samples=2), numbers(4, 6)
    logger = logging.getLogger("transformers")
    propagated, logger.propagate = logger.propagate, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for engine in ("shared_prefix", "static"):
                options: dict[str, Any] = {"engine": engine, "max_new_tokens": 6}
                open_sampler(RolloutConfig(**options), model, {VOCAB - 1}, "cpu")(model, prompts, uniform)
    finally:
        logger.propagate = propagated
    assert "deprecated" not in caplog.text


def test_the_static_cache_refuses_only_what_it_cannot_and_names_an_engine_that_can() -> None:
    model, prompts, uniform = a_model("mistral", sliding_window=8), some_prompts([6, 4]), numbers(2, 12)
    with pytest.raises(ValueError, match=r"^rollout.engine: expected shared_prefix for mistral, [^;]* got static$"):
        Static(a_rule())(model, prompts, uniform)
    sampler = open_sampler(RolloutConfig(engine="shared_prefix", max_new_tokens=12), model, {3, 7, 9}, "cpu")
    expected = [alone(model, p, u, a_rule())[0] for p, u in zip(prompts, uniform, strict=True)]
    assert sampler(model, prompts, torch.as_tensor(uniform))[0] == expected
