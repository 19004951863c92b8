"""The memory plan: sizes as people write them, shapes counted exactly, and the largest micro-batch that fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from prudent.rlhf.ppo.budget import PHASES, JobShape, ModelShape, cuts, micro_tokens, parse_size, plan

GIB = 2**30


def llama(**sizes: int) -> LlamaConfig:
    given = {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, **sizes,
    }  # fmt: skip
    return LlamaConfig(**given)


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return ModelShape.of(llama())


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GB", 80 * 10**9),
        ("80 GiB", 80 * GIB),
        ("512mb", 512 * 10**6),
        ("1.5TB", 1500 * 10**9),
        ("7000000", 7 * 10**6),
        (10**6, 10**6),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "80 GX", "-3GB", "80iB", True, "1e9GB"])
def test_text_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size as 80GB"):
        parse_size(text)


@pytest.mark.parametrize(("text", "meant"), [("80", "80GB"), (24, "24GB"), ("0", None), ("999KB", None), (0, None)])
def test_a_size_below_a_megabyte_is_refused_as_a_slip(text: str | int, meant: str | None) -> None:
    with pytest.raises(ValueError, match="expected a size of 1MB or more, got") as error:
        parse_size(text)
    assert str(error.value).endswith(f"did you mean {meant}?" if meant else repr(text))


def test_parameters_are_counted_as_the_model_has_them(shape: ModelShape) -> None:
    assert shape.parameters == 8_030_261_248  # Llama 3 8B's
    assert len(shape.adapted) == 7
    assert shape.lora_parameters(16) == 41_943_040


@pytest.mark.parametrize(
    "config",
    [
        llama(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2),
        Qwen3Config(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=16),
        GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4),
    ],
)  # fmt: skip
def test_loras_are_counted_as_peft_makes_them(config: object) -> None:
    from peft import LoraConfig, get_peft_model

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    lora = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    made = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    assert ModelShape.of(config).lora_parameters(8) == made


def test_the_largest_micro_batch_fits_and_one_sample_more_does_not(shape: ModelShape) -> None:
    job = JobShape()
    tokens = micro_tokens(shape, job, 40 * 10**9)
    assert tokens % job.tokens == 0
    assert plan(shape, job, tokens).peak <= 40 * 10**9 < plan(shape, job, tokens + job.tokens).peak


def test_no_more_than_a_steps_samples_is_ever_asked_for(shape: ModelShape) -> None:
    assert micro_tokens(shape, JobShape(prompts=2), 10**15) == 2 * JobShape().tokens


def test_where_nothing_fits_the_cuts_say_what_helps_and_whether_it_is_enough(shape: ModelShape) -> None:
    job = JobShape()
    limit = 24 * 10**9
    assert micro_tokens(shape, job, limit) == 0
    found = cuts(shape, job, limit)
    before = plan(shape, job, job.tokens).peak
    assert found
    assert found == sorted(found, key=lambda cut: -cut.saves)
    assert min(cut.saves for cut in found) >= 0.01 * before  # and so none for the optimizer's few moments
    for cut in found:
        assert cut.fits == (before - cut.saves <= limit)
    rows = next(cut for cut in found if cut.setting == "rollout.batch_rows=16")
    assert before - rows.saves == plan(shape, replace(job, batch_rows=16), job.tokens).peak


@pytest.mark.parametrize(
    ("change", "phase", "term", "grows"),
    [
        ({"checkpointing": True}, "update", "activations", False),
        ({"optimizer": "adamw_8bit"}, "update", "optimizer", False),
        ({"mode": "full"}, "update", "gradients", True),
        ({"mode": "full"}, "scoring", "parameters", True),
        ({"critic": "adapter"}, "rollout", "adapters", True),
        ({"response_tokens": 1024}, "rollout", "KV cache", True),
        ({"samples": 4}, "rollout", "KV cache", True),
        ({"masked": True}, "update", "activations", True),
        ({"reward_bytes": GIB}, "rollout", "parameters", True),
    ],
)
def test_each_setting_moves_the_term_it_is_about(
    shape: ModelShape, change: dict[str, object], phase: str, term: str, grows: bool
) -> None:
    job = JobShape(prompts=64)
    before, after = (plan(shape, j, 4096).terms[phase][term] for j in (job, replace(job, **change)))
    assert after > before if grows else after < before


def test_only_a_gpu_has_allocator_slack(shape: ModelShape) -> None:
    budget = plan(shape, JobShape(device="cpu"), 4096)
    assert all(budget.terms[phase]["allocator slack"] == 0 for phase in PHASES)
    assert all(budget.tensors(phase) == budget.total(phase) for phase in PHASES)
