"""The policy's forward pass: many families, packed as padded, no tensor of tokens by vocabulary, its precisions."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prudent.engine import EnsembleHead
from prudent.rlhf.job.log import read_metrics
from prudent.rlhf.ppo.batch import Samples, token_batch
from prudent.rlhf.ppo.config import PPOConfig
from prudent.rlhf.ppo.loop import run_ppo
from prudent.rlhf.ppo.policy import policy as policies
from prudent.rlhf.ppo.policy.adapters import StoredWide
from prudent.rlhf.ppo.policy.attention import FLASH, Attention
from prudent.rlhf.ppo.policy.load import load_model
from prudent.rlhf.ppo.policy.policy import Policy, RewardOnTrunk
from prudent.rlhf.ppo.policy.precision import cast
from prudent.rlhf.sampling.engines import Static
from prudent.rlhf.sampling.sampler import check_logits
from prudent.rlhf.sampling.tokens import Rule, Sampling

from ..cases import (
    FAMILIES,
    VOCABULARY,
    WIDTH,
    Largest,
    gradients,
    loss_of,
    make,
    plain_logprobs,
    settings,
    stirred,
    tiny,
    tiny_lm,
    whole,
)


def _load(config: PPOConfig, model: Any = None) -> Policy:
    cpu = torch.device("cpu")
    return Policy(config, load_model(config, cpu, model), device=cpu)


# packing


@pytest.mark.parametrize("family", FAMILIES)
def test_the_log_probabilities_are_the_models_own(family: str) -> None:
    lm = tiny(family, **FAMILIES[family])
    wanted = plain_logprobs(lm, 0.7)
    policy, batch = make(lm), whole()
    with torch.no_grad():
        ours = policy.logprobs(policy.hidden(batch, "actor"), batch, 0.7).logprob
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "opt"])
def test_packed_is_padded_to_rounding(family: str) -> None:
    # log-probabilities, entropies, values, rewards and gradients; windows are shorter than the sequences
    results = []
    for packed in (False, True):
        head = EnsembleHead(WIDTH, 3)
        head.reset_parameters(torch.Generator().manual_seed(3))
        lm = tiny(family, **FAMILIES[family])
        policy = stirred(make(lm, packed=packed, reward=RewardOnTrunk(head), policy={"critic": "adapter"}))
        assert policy.packed is packed
        batch = whole(packed)
        with torch.no_grad():
            hidden = policy.hidden(batch, "actor")
            out = policy.logprobs(hidden, batch, 0.7)
            values = policy.values(policy.hidden(batch, "critic")[batch.rows])
            reward = head(policy.hidden(batch, "reward"), batch.last).reward
        results.append([*out, values, reward, *gradients(policy, batch).values()])
    for padded, packed_one in zip(*results, strict=True):
        torch.testing.assert_close(packed_one, padded, rtol=1e-4, atol=2e-5)


def test_a_model_without_position_ids_cannot_be_packed() -> None:
    def bloom() -> Any:
        torch.manual_seed(0)
        config = AutoConfig.for_model("bloom", vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=2, n_head=4)
        return AutoModelForCausalLM.from_config(config).eval()

    with pytest.raises(ValueError, match=r"packed: expected false, because BloomForCausalLM takes no position_ids"):
        make(bloom(), packed=True)
    assert not make(bloom()).packed
    torch.testing.assert_close(
        make(bloom()).logprobs(make(bloom()).hidden(whole(), "actor"), whole(), 1.0).logprob,
        plain_logprobs(bloom()),
        rtol=1e-4,
        atol=1e-4,
    )


def test_an_architecture_that_mixes_packed_sequences_is_not_packed() -> None:
    # transformers' OPT makes itself a mask of ones where it is given none, and so masks causally and nothing more
    with pytest.raises(ValueError, match=r"^packed: expected false, because OPTForCausalLM mixes sequences"):
        make(tiny("opt", **FAMILIES["opt"]), packed=True)


def test_packed_flash_attention_is_told_where_sequences_begin() -> None:
    policy, batch, seen = make(), whole(packed=True), {}
    policy.attention = FLASH  # as resolved on a GPU; what the trunk is handed is all that can be seen here

    def spy(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        seen.update(kwargs)
        return args, {name: value for name, value in kwargs.items() if "seq_len" not in name and "max_len" not in name}

    policy.model.base_model.register_forward_pre_hook(spy, with_kwargs=True)
    policy.hidden(batch, "actor")
    assert seen["cu_seq_lens_q"].tolist() == seen["cu_seq_lens_k"].tolist() == [0, 5, 13, 14, 19]
    assert seen["cu_seq_lens_q"].dtype == torch.int32
    assert seen["max_length_q"] == seen["max_length_k"] == 8


# memory and precision


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_nothing_as_large_as_tokens_times_vocabulary_is_made_forward_or_backward(mode: str) -> None:
    vocabulary, rows = 20_000, 16 * 40
    samples = Samples([[1, 2]] * 16, [list(range(3, 43))] * 16, [False] * 16, [0] * 16)
    policy = make(tiny_lm(vocab_size=vocabulary), policy={"mode": mode, "critic": "shared"}).train()
    batch = token_batch(samples, range(16), packed=False, device="cpu")
    assert len(batch.rows) == rows
    with Largest() as watch:
        loss_of(policy, batch).backward()
    # a tile of logits is 4 MiB on a CPU, the embedding's gradient (mode full) vocabulary x width
    assert watch.elements <= max(2**20, vocabulary * WIDTH) < rows * vocabulary / 10
    with Largest() as watch, torch.no_grad():
        policy.model(batch.input_ids)  # the watch sees what it is to see
    assert watch.elements >= rows * vocabulary


def test_a_bf16_trunk_feeds_its_loras_bf16_and_their_weights_and_gradients_are_fp32() -> None:
    policy, inputs = stirred(make(tiny_lm().to(torch.bfloat16))), []
    wide = [module for module in policy.modules() if isinstance(module, StoredWide)]
    assert len(wide) == 2 * 2 * 7
    for module in wide:
        module.register_forward_hook(lambda module, args, out: inputs.append((args[0].dtype, out.dtype)))
    hidden = policy.hidden(whole(), "actor")
    assert hidden.dtype == policy.dtype == torch.bfloat16
    assert set(inputs) == {(torch.bfloat16, torch.bfloat16)}
    assert {gradient.dtype for gradient in gradients(policy, whole()).values()} == {torch.float32}
    assert policy.values(hidden).dtype == torch.float32


def test_fp32_weights_that_are_all_trained_compute_in_bf16_under_autocast() -> None:
    # as on a GPU with mode full and dtype auto; no GPU is needed to see the dtypes
    exact, policy = (stirred(make(policy={"mode": "full"})) for _ in range(2))
    batch = whole()
    policy._autocast, policy.dtype = True, torch.bfloat16
    hidden = policy.hidden(batch, "actor")
    assert hidden.dtype == torch.bfloat16
    assert {gradient.dtype for gradient in gradients(policy, batch).values()} == {torch.float32}
    with torch.no_grad():
        wide = exact.logprobs(exact.hidden(batch, "actor"), batch, 1.0).logprob
        narrow = policy.logprobs(hidden, batch, 1.0).logprob
    torch.testing.assert_close(narrow, wide, rtol=0.1, atol=0.1)


def _both_logprobs(policy: Policy) -> tuple[torch.Tensor, torch.Tensor]:
    """The actor's and the reference's log-probabilities of 2 x 400 random tokens."""
    ids = torch.randint(1, VOCABULARY, (2, 404), generator=torch.Generator().manual_seed(2)).tolist()
    samples = Samples([row[:4] for row in ids], [row[4:] for row in ids], [False] * 2, [0, 1])
    batch = token_batch(samples, range(2), packed=False, device="cpu")
    with torch.no_grad():
        actor = policy.logprobs(policy.hidden(batch, "actor"), batch, 1.0).logprob
        return actor, policy.logprobs(policy.hidden(batch, "reference"), batch, 1.0, "reference").logprob


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_an_untrained_policy_in_bf16_is_its_reference_to_the_bit_however_long_the_text(
    mode: str, tmp_path: Path
) -> None:
    tiny_lm(max_position_embeddings=512).save_pretrained(tmp_path)
    options = {"model": str(tmp_path), "dtype": "bfloat16", "reward": {"source": "vader", "kind": "callable"}}
    policy = _load(settings(policy={"mode": mode}, **options))
    assert policy.dtype == torch.bfloat16
    actor, reference = _both_logprobs(policy)
    assert torch.equal(actor, reference)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_model_that_is_given_in_fp32_becomes_what_is_loaded_in_bf16(mode: str, tmp_path: Path) -> None:
    # its rotary frequencies stay fp32: in bf16 positions some hundred tokens apart are taken for others
    given = tiny_lm(max_position_embeddings=512)
    given.save_pretrained(tmp_path)
    config = settings(
        model=str(tmp_path), dtype="bfloat16", reward={"source": "vader", "kind": "callable"}, policy={"mode": mode}
    )
    results = []
    for model in (None, given):
        torch.manual_seed(0)
        policy = _load(config, model)
        for part in filter(None, (policy.model, policy.frozen)):
            assert {b.dtype for name, b in part.named_buffers() if "inv_freq" in name} == {torch.float32}
            assert {p.dtype for n, p in part.named_parameters() if "lora" not in n} == {torch.bfloat16}
        results.append(_both_logprobs(policy))
    for loaded, passed in zip(*results, strict=True):
        assert torch.equal(loaded, passed)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU has with mode full and dtype auto: fp32 weights under autocast, and an attention that takes half
    precisions alone, as flash-attn does."""

    def half_only(module: Any, query: torch.Tensor, *args: Any, **options: Any) -> Any:
        if query.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
            raise RuntimeError("FlashAttention only supports fp16 and bf16 data type")
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *args, **options)

    AttentionInterface.register("half_only", half_only)
    AttentionMaskInterface.register("half_only", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    monkeypatch.setattr(policies, "is_mixed", lambda config, *_: config.policy.mode == "full")
    monkeypatch.setattr(policies, "resolve", lambda *_: Attention("half_only", packed=True))


@pytest.mark.usefixtures("on_a_gpu")
def test_mixed_weights_are_probed_and_sampled_in_bf16_and_are_themselves_again_afterwards() -> None:
    lm = tiny_lm(tie_word_embeddings=True)
    narrow = cast(copy.deepcopy(lm), torch.bfloat16)
    policy = make(lm, policy={"mode": "full"})
    assert (policy.attention, policy.packed, policy.dtype) == ("half_only", True, torch.bfloat16)
    weights = dict(policy.model.named_parameters())
    prompts, uniform = [[5, 6, 7], [8, 9]], torch.rand(2, 12, generator=torch.Generator().manual_seed(4))
    engine = Static(Rule(Sampling(12, 1.0, 0, 1.0), 0, {1}))
    with policy.sampling() as model:
        check_logits(model)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        drawn = engine(model, prompts, uniform)
    assert drawn == engine(narrow, prompts, uniform)
    after = dict(policy.model.named_parameters())
    assert weights.keys() == after.keys()
    assert all(after[name] is weight and weight.dtype == torch.float32 for name, weight in weights.items())
    assert all(gradient.dtype == torch.float32 for gradient in gradients(policy, whole(packed=True)).values())


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("engine", ["shared_prefix", "static"])
def test_a_run_with_mixed_weights_goes_through_its_steps(engine: str, tiny_chat_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("the food\na hotel\n")
    (tmp_path / "rewards.py").write_text("def length(prompts, responses):\n    return [len(r) for r in responses]\n")
    config = settings(
        model=str(tiny_chat_folder),
        prompts=str(tmp_path / "prompts.txt"),
        output=tmp_path / "run",
        reward={"source": f"{tmp_path / 'rewards.py'}:length"},
        policy={"mode": "full"},
        rollout={"prompts_per_step": 2, "max_new_tokens": 6, "engine": engine},
        steps=1,
    )
    run_ppo(config, progress=False)
    (row,) = read_metrics(tmp_path / "run")
    assert row["update/steps"] > 0


def test_a_bf16_policy_samples_from_what_it_scores() -> None:
    policy, batch = stirred(make(tiny_lm().to(torch.bfloat16))), whole()
    state = {name: tensor.clone() for name, tensor in policy.trainable_state().items()}
    scored = policy.hidden(batch, "actor").detach()
    addresses = []
    for _ in range(2):
        with policy.sampling() as model:
            assert model is policy.model
            assert not torch.is_grad_enabled()
            assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.bfloat16}
            addresses.append([p.data_ptr() for n, p in model.named_parameters() if "lora" in n])
            drawn = model.base_model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        rows = batch.rows
        torch.testing.assert_close(drawn.flatten(0, 1)[rows], scored[rows], rtol=0.02, atol=0.02)
    assert addresses[0] == addresses[1]  # a captured graph reads them again
    for name, tensor in policy.trainable_state().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, state[name])


def test_sampling_restores_the_mode_and_the_weights_after_an_error() -> None:
    policy = make(tiny_lm().to(torch.bfloat16)).train()
    with policy.sampling() as model:
        assert not model.training
    with contextlib.suppress(RuntimeError), policy.sampling():
        raise RuntimeError
    assert policy.model.training
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
