"""One trunk in four roles: what each computes, what trains, what is saved, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from prudent.engine import EnsembleHead, EnsembleRewardModel
from prudent.rlhf.ppo.policy.describe import describe_policy
from prudent.rlhf.ppo.policy.load import load_model
from prudent.rlhf.ppo.policy.policy import Policy, RewardOnTrunk
from prudent.rlhf.ppo.policy.precision import trunk_dtype

from ..cases import FAMILIES, WIDTH, gradients, make, plain_logprobs, settings, stirred, tiny, tiny_lm, whole

# roles


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_fresh_policy_is_its_reference_to_the_bit_and_its_values_are_zero(mode: str) -> None:
    policy, batch = make(policy={"mode": mode}), whole()
    with torch.no_grad():
        actor, reference = policy.hidden(batch, "actor"), policy.hidden(batch, "reference")
        assert torch.equal(actor, reference)
        torch.testing.assert_close(policy.logprobs(actor, batch, 0.7).logprob, plain_logprobs(tiny_lm(), 0.7))
        assert not policy.values(actor).any()


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_training_moves_the_actor_and_leaves_the_reference_where_it_was(mode: str) -> None:
    policy, batch = make(policy={"mode": mode}), whole()
    stirred(policy)
    with torch.no_grad():
        reference = policy.logprobs(policy.hidden(batch, "reference"), batch, 1.0, "reference").logprob
        actor = policy.logprobs(policy.hidden(batch, "actor"), batch, 1.0).logprob
    torch.testing.assert_close(reference, plain_logprobs(tiny_lm()))
    torch.testing.assert_close(actor, plain_logprobs(policy.model))  # between calls the actor is on
    assert (actor - reference).abs().max() > 0.1


def test_a_shared_critic_reads_the_actors_hidden_states_and_an_adapter_its_own() -> None:
    batch = whole()
    with torch.no_grad():
        shared = stirred(make())
        assert torch.equal(shared.hidden(batch, "critic"), shared.hidden(batch, "actor"))
        own = stirred(make(policy={"critic": "adapter"}))
        assert not torch.allclose(own.hidden(batch, "critic"), own.hidden(batch, "actor"))


@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_a_critic_that_starts_from_the_reward_gives_the_mean_of_its_calibrated_heads(critic: str) -> None:
    head = EnsembleHead(WIDTH, 3)
    head.shift.copy_(torch.tensor([0.5, -1.0, 2.0]))
    head.scale.copy_(torch.tensor([2.0, 0.5, 1.0]))
    start = {"critic": critic, "critic_init": "reward"}
    policy = make(reward=RewardOnTrunk(head), policy=start)
    with torch.no_grad():
        hidden = policy.hidden(whole(), "critic")
        mean = head(policy.hidden(whole(), "reference")).mean.mean(dim=1)
        torch.testing.assert_close(policy.values(hidden), mean, rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for p in policy.value_head.parameters())
    meta = Policy(settings(policy=start), tiny_lm().to("meta"), device="meta", reward=RewardOnTrunk(head.frozen_copy()))
    assert meta.value_head.weight.is_meta  # as `prudent plan` makes it
    with pytest.raises(ValueError, match=r"policy.critic_init: expected zero without reward heads on the policy's own"):
        make(policy=start)


def test_without_a_critic_there_are_no_values() -> None:
    policy = make(policy={"critic": "none"}, update={"estimator": "rloo"}, rollout={"samples_per_prompt": 2})
    assert policy.value_head is None
    with pytest.raises(ValueError, match=r"policy.critic: expected shared or adapter, got none"):
        policy.values(torch.zeros(1, WIDTH))


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_reward_adapter_reads_the_trunk_as_peft_does(mode: str, tmp_path: Path) -> None:
    stirred(make()).save(tmp_path)  # any LoRA serves
    head, batch = EnsembleHead(WIDTH, 3), whole()
    policy = stirred(make(reward=RewardOnTrunk(head, tmp_path), policy={"mode": mode}))
    alone = PeftModel.from_pretrained(tiny_lm(), tmp_path).get_base_model()
    with torch.no_grad():
        ours = policy.hidden(batch, "reward")[batch.last]
        theirs = alone.model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state.flatten(0, 1)
        torch.testing.assert_close(ours, theirs[batch.last])
        torch.testing.assert_close(
            policy.logprobs(policy.hidden(batch, "reference"), batch, 1.0, "reference").logprob,
            plain_logprobs(tiny_lm()),
        )
    assert policy.reward_kind == "adapter"
    assert not any("reward" in name for name in policy.trainable_state())


def test_only_the_parts_asked_for_are_trained() -> None:
    policy = make(reward=RewardOnTrunk(EnsembleHead(WIDTH, 3)), policy={"critic": "adapter"}, update={"lr": 0.5})
    groups = {group["name"]: group for group in policy.parameter_groups(policy.config)}
    assert {name: group["lr"] for name, group in groups.items()} == {"actor": 0.5, "critic": 0.5, "value_head": 5.0}
    trained = {id(p) for p in policy.parameters() if p.requires_grad}
    assert trained == {id(p) for group in groups.values() for p in group["params"]}
    assert len(groups["actor"]["params"]) == len(groups["critic"]["params"]) == 2 * 2 * 7
    rates = {g["name"]: g["lr"] for g in make().parameter_groups(settings())}
    assert rates == {"actor": 1e-4, "value_head": pytest.approx(1e-3)}
    full = make(policy={"mode": "full"})
    assert {g["name"]: g["lr"] for g in full.parameter_groups(full.config)}["actor"] == 1e-6
    assert not any(p.requires_grad for p in full.frozen.parameters())


def test_dropout_of_the_trunk_is_off_in_training_too() -> None:
    policy, batch = make(tiny_lm(attention_dropout=0.5)), whole()
    policy.train()
    assert torch.equal(policy.hidden(batch, "actor"), policy.hidden(batch, "actor"))
    noisy = stirred(make(policy={"lora_dropout": 0.5})).train()  # the LoRA's own is the user's choice
    assert not torch.equal(noisy.hidden(batch, "actor"), noisy.hidden(batch, "actor"))


# gradients


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_checkpointed_gradients_are_the_plain_ones(mode: str, critic: str) -> None:
    # with a critic's LoRA the actor's layers are computed again while the critic's would be on, were it left on
    options = {"mode": mode, "critic": critic}
    plain = gradients(stirred(make(policy=options)), whole())
    again = gradients(stirred(make(policy={**options, "gradient_checkpointing": True})), whole())
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(again[name], gradient, msg=name)


def test_checkpointing_computes_again_with_the_lora_of_its_forward_pass() -> None:
    policy, batch = stirred(make(policy={"critic": "adapter", "gradient_checkpointing": True})).train(), whole()
    policy.values(policy.hidden(batch, "critic")).sum().backward()  # the actor is on when this runs
    trained = {g["name"]: g["params"] for g in policy.parameter_groups(policy.config)}
    assert all(p.grad is None for p in trained["actor"])
    plain = stirred(make(policy={"critic": "adapter"})).train()
    plain.values(plain.hidden(batch, "critic")).sum().backward()
    for ours, theirs in zip(trained["critic"], plain.parameter_groups(plain.config)[1]["params"], strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


# state


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_trainable_state_put_back_is_the_policy_it_came_from(mode: str) -> None:
    options = {"mode": mode, "critic": "adapter"}
    trained, fresh, batch = stirred(make(policy=options)), make(policy=options), whole()
    fresh.load_trainable_state({name: tensor.clone() for name, tensor in trained.trainable_state().items()})
    with torch.no_grad():
        for role in ("actor", "critic", "reference"):
            assert torch.equal(fresh.hidden(batch, role), trained.hidden(batch, role))
        assert torch.equal(fresh.values(torch.ones(1, WIDTH)), trained.values(torch.ones(1, WIDTH)))


def test_another_trainable_state_is_refused_and_changes_nothing() -> None:
    policy = stirred(make())
    before = {name: tensor.clone() for name, tensor in policy.trainable_state().items()}
    name = next(iter(before))
    short = {key: value + 1 for key, value in before.items() if key != name}
    with pytest.raises(ValueError, match=rf"expected this policy's 30 tensors, got 29: {name} is in only one"):
        policy.load_trainable_state(short)
    with pytest.raises(ValueError, match=r"value_head/weight: expected \[1, 32\], got \[1, 31\]"):
        policy.load_trainable_state({**{k: v + 1 for k, v in before.items()}, "value_head/weight": torch.zeros(1, 31)})
    for key, tensor in policy.trainable_state().items():
        assert torch.equal(tensor, before[key])


def test_what_is_saved_is_an_adapter_that_peft_loads(tmp_path: Path) -> None:
    policy = stirred(make(policy={"critic": "adapter"}))
    policy.save(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_lm(), tmp_path)
    torch.testing.assert_close(plain_logprobs(loaded), plain_logprobs(policy.model))
    assert {path.name for path in tmp_path.iterdir()} >= {"value_head.safetensors", "critic"}
    critic = PeftModel.from_pretrained(tiny_lm(), tmp_path / "critic").get_base_model()
    with torch.no_grad():
        theirs = critic.model(whole().input_ids, attention_mask=whole().attention_mask).last_hidden_state
        rows = whole().rows
        torch.testing.assert_close(policy.hidden(whole(), "critic")[rows], theirs.flatten(0, 1)[rows])


def test_a_whole_model_is_saved_whole(tmp_path: Path) -> None:
    policy = stirred(make(policy={"mode": "full"}))
    policy.save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(plain_logprobs(loaded), plain_logprobs(policy.model))


# loading


def test_a_model_is_loaded_or_taken_as_given_in_the_dtype_asked_for(tiny_chat_folder: Path) -> None:
    cpu, name = torch.device("cpu"), str(tiny_chat_folder)
    assert load_model(settings(model=name), cpu).dtype == torch.float32
    assert load_model(settings(model=name, dtype="bfloat16"), cpu).dtype == torch.bfloat16
    given = tiny_lm().to(torch.bfloat16)
    assert load_model(settings(), cpu, given) is given
    assert given.dtype == torch.bfloat16
    assert load_model(settings(dtype="float32"), cpu, given).dtype == torch.float32


def test_a_lora_for_a_model_is_refused_with_the_way_to_merge_it(tmp_path: Path) -> None:
    base = tiny_lm()
    base.save_pretrained(tmp_path / "base")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig()).save_pretrained(
        tmp_path / "lora"
    )
    with pytest.raises(ValueError, match=r"^model: expected a whole .*lora, a LoRA: merge it .*merge_and_unload"):
        load_model(settings(model=str(tmp_path / "lora")), torch.device("cpu"))


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def test_weights_cut_short_are_one_sentence_with_their_file(tmp_path: Path) -> None:
    tiny_lm().save_pretrained(tmp_path / "model")
    _cut(tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=r"^model: .*model: its weights cannot be read \(.*\)$"):
        load_model(settings(model=str(tmp_path / "model")), torch.device("cpu"))
    make().save(tmp_path)
    _cut(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"^reward\.source: .*adapter_model.safetensors: its weights cannot be read"):
        make(reward=RewardOnTrunk(EnsembleHead(WIDTH, 3), tmp_path))


def test_what_is_no_causal_language_model_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    EnsembleRewardModel.from_trunk(tiny_lm(), num_heads=2).save_pretrained(tmp_path / "reward")
    AutoConfig.for_model("t5").save_pretrained(tmp_path / "t5")
    monkeypatch.chdir(tmp_path)
    for name, said in (
        ("./reward", "expected a causal language model, got the reward model ./reward, which cannot generate text"),
        ("./t5", "expected a causal language model, got ./t5, of model type t5"),
        ("reward/nope", "reward/nope: no such file or folder"),
    ):
        with pytest.raises(ValueError, match=f"^model: {re.escape(said)}"):
            load_model(settings(model=name), torch.device("cpu"))


def test_the_trunks_dtype_follows_device_and_mode() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert trunk_dtype(settings(), cpu) == torch.float32
    assert trunk_dtype(settings(), gpu) == torch.bfloat16
    # AdamW's steps of 1e-6 are below half the spacing of bf16 numbers at a weight's size
    assert trunk_dtype(settings(policy={"mode": "full"}), gpu) == torch.float32
    assert trunk_dtype(settings(dtype="bfloat16", policy={"mode": "full"}), gpu) == torch.bfloat16


# what is refused


def test_logits_that_linear_logprob_cannot_compute_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a language-model head without a bias, got one in PhiForCausalLM"):
        make(tiny("phi", intermediate_size=48))

    class Doubled(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = 2 * out.logits
            return out

    lm = tiny_lm()
    lm.__class__ = Doubled
    with pytest.raises(ValueError, match=r"expected logits that are the last hidden states times .* from Doubled"):
        make(lm)
    lm = tiny("gemma2", **FAMILIES["gemma2"])
    lm.config.logit_scale = 0.5
    with pytest.raises(ValueError, match=r"scaled or capped, got both in Gemma2ForCausalLM: scale 0.5, cap 3"):
        make(lm)


def test_heads_and_adapters_of_another_width_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reward.source: expected heads on hidden states of width 64, got 32"):
        make(reward=RewardOnTrunk(EnsembleHead(WIDTH, 3), taps=["last:2", "mean:1"]))
    wide = RewardOnTrunk(EnsembleHead(2 * WIDTH, 3), taps=["last:2", "mean:1"])
    with pytest.raises(ValueError, match=r"critic_init: expected zero with .* which are last:2, mean:1, got reward"):
        make(reward=wide, policy={"critic_init": "reward"})
    with pytest.raises(ValueError, match=r"reward.source: expected heads on hidden states of width 32, got 16"):
        make(reward=RewardOnTrunk(EnsembleHead(16, 3)))
    make(tiny_lm(hidden_size=16)).save(tmp_path)
    with pytest.raises(ValueError, match=r"fits tiny, got .*: size mismatch for .*q_proj.lora_A.reward.weight.*\.$"):
        make(reward=RewardOnTrunk(EnsembleHead(WIDTH, 3), tmp_path))
    make(tiny_lm(num_hidden_layers=3)).save(tmp_path)
    with pytest.raises(ValueError, match=r"fits tiny, got .*: base_model.*layers.2.* is in only one of them"):
        make(reward=RewardOnTrunk(EnsembleHead(WIDTH, 3), tmp_path))


# what is said


def test_the_description_says_the_combination_and_its_bytes() -> None:
    policy = make(reward=RewardOnTrunk(EnsembleHead(WIDTH, 3)))
    text = describe_policy(policy)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert trained == 16 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48)) + 33
    for line in (
        "policy: LlamaForCausalLM, 2 layers of width 32, float32, sdpa, padded, on cpu",
        "actor: LoRA of rank 16",
        "reference: the same trunk, LoRAs off",
        "critic: a value head on the actor's hidden states (no pass of its own)",
        "reward: 3 heads on the reference's hidden states (no pass of their own)",
        f"trained: {trained} parameters: weights {4 * trained / 1024:.2f} KiB, gradients {4 * trained / 1024:.2f} KiB, "
        f"adamw {8 * trained / 1024:.2f} KiB",
    ):
        assert line in text.splitlines()
    assert "a frozen copy of the model" in describe_policy(make(policy={"mode": "full"}))
    assert "one more pass" in describe_policy(make(policy={"critic": "adapter"}))
