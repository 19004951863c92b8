"""Small random models of families that vLLM has, each loaded by vLLM in this process and equal to `Scorer`."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from prudent import EnsembleRewardConfig, EnsembleRewardModel

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: `make doors-vllm`"),
]

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": {},
    # without its cap on attention scores: vLLM's attention for CPUs computes the tanh less exactly
    "gemma2": {"query_pre_attn_scalar": 32, "sliding_window": 16, "attn_logit_softcapping": None},
    "gemma3_text": {"query_pre_attn_scalar": 32, "sliding_window": 16},
    "olmo2": {},
    "phi3": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
TEXTS = [[5, 6, 7], list(range(3, 60)), [9] * 33, [5, 6, 7, 8]]


@pytest.fixture
def folder(tiny_chat_folder: Path, tmp_path: Path) -> Path:
    """Empty but for a tokeniser, without which vLLM does not pool."""
    AutoTokenizer.from_pretrained(tiny_chat_folder).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}.items():
        monkeypatch.setenv(name, value)
    yield
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def scored(folder: Path, **options: Any) -> list[list[float]]:
    """What vLLM answers to `TEXTS`."""
    from vllm import LLM

    given: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "runner": "pooling", "max_num_seqs": 8}
    llm = LLM(str(folder), **{**given, **options})
    outputs = llm.classify([{"prompt_token_ids": ids} for ids in TEXTS], use_tqdm=False)
    return [output.outputs.probs for output in outputs]


def saved(trunk: Any, folder: Path, **given: Any) -> EnsembleRewardModel:
    model = EnsembleRewardModel.from_trunk(trunk.eval(), num_heads=3, **given)
    torch.nn.init.normal_(model.score.weight, std=0.1)
    model.save_pretrained(folder)
    return model


def expected(model: EnsembleRewardModel) -> list[list[float]]:
    found = []
    for ids in TEXTS:
        with torch.no_grad():
            start = torch.tensor([0]) if model.config.reads_response else None
            output = model(torch.tensor([ids]), response_start=start)
        found.append(torch.cat([output.mean[0], output.std[0], output.logits[0]]).tolist())
    return found


def check(folder: Path, model: EnsembleRewardModel, **options: Any) -> None:
    # before vLLM, which runs families without code of its own by changing transformers' classes in this process
    wanted = expected(model)
    for got, numbers in zip(scored(folder, **options), wanted, strict=True):
        assert got == pytest.approx(numbers, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_scored_as_transformers_scores_it(family: str, folder: Path) -> None:
    torch.manual_seed(0)
    model = saved(AutoModel.from_config(AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})), folder)
    check(folder, model)


def test_tokens_that_the_heads_skip_are_skipped(folder: Path) -> None:
    torch.manual_seed(0)
    model = saved(AutoModel.from_config(AutoConfig.for_model("llama", **SIZES)), folder, skip_token_id=8)
    assert TEXTS[-1][-1] == 8
    check(folder, model)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_states_of_inner_layers_are_read_over_several_passes(family: str, folder: Path) -> None:
    """Chunked prefill: a text of 57 tokens takes four passes of 16."""
    torch.manual_seed(0)
    trunk = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, tie_word_embeddings=True))
    model = saved(trunk, folder, taps=["last:-1", "mean:1", "logprob"], logprob_skips=[6])
    check(folder, model, max_num_batched_tokens=16, enable_chunked_prefill=True)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("mamba", "caches a recurrent state"),
        ("bert", "encoder 'bert'"),
        ("gpt_neox", "runs with transformers' code"),
    ],
)
def test_another_is_refused_by_name(family: str, why: str, folder: Path) -> None:
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    saved(AutoModel.from_config(AutoConfig.for_model(family, **sizes)), folder)
    assert isinstance(AutoConfig.from_pretrained(folder), EnsembleRewardConfig)
    with pytest.raises(ValueError, match=why):
        scored(folder)
