"""The LoRA and heads that `prudent train` with mode lora keeps for a policy on the same trunk."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from prudent.engine import EnsembleHead, EnsembleRewardModel, Scorer
from prudent.rlhf.job.config import load_config
from prudent.rlhf.models.adapter import adapter_settings, is_reward_adapter, load_head, load_lora, save_head, save_lora
from prudent.rlhf.reward.train import TrainConfig, run_train

GOOD, BAD = ["good", "great", "happy", "love", "lovely"], ["bad", "awful", "sad", "hate", "horrible"]


@pytest.fixture(scope="module", params=["base", "stage1"])
def run(
    request: pytest.FixtureRequest, tiny_chat_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> TrainConfig:
    """A finished run in mode lora, for each trunk that stage 2 may start from: the LoRA is that of the base model."""
    folder = tmp_path_factory.mktemp("lora")
    rows = [
        {"prompt": f"{noun} is", "chosen": good, "rejected": bad}
        for noun in ["food", "hotel", "train", "film", "soup", "room"]
        for good, bad in zip(GOOD, BAD, strict=True)
    ]
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    entries = ["trunk.max_steps=3", "trunk.lr=0.05", "trunk.lora_rank=2", "brme.num_heads=3", "dtype=float32"]
    entries.append(f"trunk.stage2_from={request.param}")
    config = load_config(
        TrainConfig,
        None,
        entries,
        model=str(tiny_chat_folder),
        data=str(data),
        output=folder / "run",
        mode="lora",
        eval_fraction=0.0,
    )
    run_train(config, progress=False)
    return config


def test_a_lora_run_keeps_its_adapter_and_heads_and_they_say_what_the_merged_model_says(run: TrainConfig) -> None:
    folder = run.output / "adapter"
    assert is_reward_adapter(folder)
    assert not is_reward_adapter(run.output / "model")
    assert adapter_settings(folder)["append_eos"] is True
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    split = EnsembleRewardModel.from_trunk(adapted.get_base_model().model, head=load_head(folder)).eval()
    merged = EnsembleRewardModel.from_pretrained(run.output / "model", dtype=torch.float32).eval()
    texts = [[{"role": "user", "content": "food is"}, {"role": "assistant", "content": word}] for word in GOOD + BAD]
    ours, theirs = (Scorer(model, tokenizer, progress=False).score(texts) for model in (split, merged))
    assert str(split.score.aggregation) == str(merged.score.aggregation) == "tradeoff:0.4"
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor(ours.reward), torch.tensor(theirs.reward), rtol=1e-4, atol=1e-4)
    weights = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert len(weights) == 14  # 7 linear layers in each of 2 blocks
    assert all(float(p.abs().max()) > 0 for p in weights)  # trained, and found under the causal model's names


def test_a_run_killed_before_the_adapter_was_kept_gets_it_when_resumed(run: TrainConfig, tmp_path: Path) -> None:
    copy = run.model_copy(update={"output": tmp_path / "run"})
    shutil.copytree(run.output, copy.output)
    shutil.rmtree(copy.output / "adapter")
    (copy.output / "train.json").unlink()
    config_file = copy.output / "config.yaml"
    config_file.write_text(config_file.read_text().replace(str(run.output), str(copy.output)))
    run_train(copy, resume=True, progress=False)
    for name in ("adapter_model.safetensors", "head.safetensors", "head.json", "adapter_config.json"):
        assert (copy.output / "adapter" / name).read_bytes() == (run.output / "adapter" / name).read_bytes()


def test_a_lora_is_named_as_in_the_causal_language_model(tmp_path: Path) -> None:
    # EnsembleRewardModel calls its trunk `model`, GPT-2 calls it `transformer`
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    torch.manual_seed(0)
    lm = GPT2LMHeadModel(config).eval()
    base, other = copy.deepcopy(lm), EnsembleRewardModel.from_trunk(copy.deepcopy(lm), num_heads=2)
    reward = EnsembleRewardModel.from_trunk(lm, num_heads=2)
    lora = {"target_modules": "all-linear", "fan_in_fan_out": True}
    adapted = get_peft_model(reward, LoraConfig(**lora)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    prefix = ("model", reward.model.base_model_prefix)
    save_lora(adapted, "default", tmp_path, trunk_prefix=prefix)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        wanted = reward.model(ids).last_hidden_state
        loaded = PeftModel.from_pretrained(base, tmp_path).get_base_model().transformer(ids).last_hidden_state
    torch.testing.assert_close(loaded, wanted)
    again = get_peft_model(other, LoraConfig(**lora)).eval()
    load_lora(again, "default", tmp_path, trunk_prefix=prefix)
    with torch.no_grad():
        assert torch.equal(other.model(ids).last_hidden_state, wanted)
    narrow = get_peft_model(EnsembleRewardModel.from_trunk(base, num_heads=2), LoraConfig(r=4, **lora))
    with pytest.raises(ValueError, match=r"expected a LoRA whose .*lora_A.weight is \[4, 16\], got \[8, 16\]"):
        load_lora(narrow, "default", tmp_path, trunk_prefix=prefix)


def test_a_head_comes_back_as_it_was_kept(tmp_path: Path) -> None:
    head = EnsembleHead(4, 3, aggregation="uwo:0.5", std_floor=0.25)
    head.shift.fill_(2.0)
    save_head(head, tmp_path, append_eos=False, max_score_length=12)
    settings = adapter_settings(tmp_path)
    assert (settings["append_eos"], settings["max_score_length"]) == (False, 12)
    back = load_head(tmp_path)
    assert (str(back.aggregation), back.std_floor, back.num_heads) == ("uwo:0.5", 0.25, 3)
    for name, tensor in head.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)
    assert not any(p.requires_grad for p in back.parameters())


def test_a_folder_without_heads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected head.json and head.safetensors, as `prudent train`"):
        load_head(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("head.json", b"{broken", r"head\.json: expected a JSON object, got broken JSON"),
        ("head.json", b'{"hidden_size": 4}', r"head\.json: expected .*, got none for num_heads, aggregation"),
        ("head.safetensors", b"\x08", r"head\.safetensors: its weights cannot be read \(Error while deserializing"),
    ],
)
def test_a_broken_file_of_the_heads_is_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    save_head(EnsembleHead(4, 3), tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        load_head(tmp_path)
    if name == "head.json":
        with pytest.raises(ValueError, match=says):
            adapter_settings(tmp_path)


def test_heads_of_another_shape_than_their_settings_are_refused(tmp_path: Path) -> None:
    save_head(EnsembleHead(4, 3), tmp_path)
    settings = json.loads((tmp_path / "head.json").read_text())
    (tmp_path / "head.json").write_text(json.dumps({**settings, "num_heads": 2}))
    with pytest.raises(ValueError, match=r"head\.safetensors: its weights cannot be read \(size mismatch for weight: "):
        load_head(tmp_path)
