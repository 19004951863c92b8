"""Models that read several taps: what they read, in every family, padded or not; and what they refuse."""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from prudent.engine import EnsembleHead, EnsembleRewardConfig, EnsembleRewardModel
from prudent.engine.taps import num_layers

from .conftest import FAMILIES
from .test_families import SLOW, long_trunk, small_trunk, text_families, tokens

TAPS = ["last:-1", "mean:1", "last:0", "mean:-1"]
START = torch.tensor([3, 9])


@pytest.fixture
def make_model(tiny_trunk):
    def build(family="llama", taps=TAPS, **options):
        torch.manual_seed(1)
        return EnsembleRewardModel.from_trunk(tiny_trunk(family), taps=taps, num_heads=3, **options)

    return build


def wanted(trunk: Any, ids: torch.Tensor, start: int, place: int) -> torch.Tensor:
    """TAPS of one whole row [1, T], from the states that transformers itself returns."""
    states = trunk(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True).hidden_states
    parts = [states[-1][0, place], states[1][0, start:].mean(0), states[0][0, place], states[-1][0, start:].mean(0)]
    return torch.cat(parts)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_taps_are_transformers_hidden_states_however_a_batch_is_padded(make_model, family):
    model, ids = make_model(family), tokens(2, 10)
    place = 0 if model.config.pooling == "first" else -1
    alone = torch.stack([wanted(model.model, ids[row : row + 1], int(START[row]), place) for row in range(2)])
    assert model.config.feature_size == alone.shape[1] == 128
    torch.testing.assert_close(model.features(ids, response_start=START), alone, rtol=0, atol=5e-6)
    for before, after in ((0, 5), (5, 0), (2, 3)):
        padded = torch.nn.functional.pad(ids, (before, after), value=7)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (before, after))
        torch.testing.assert_close(model.features(padded, mask, START), alone, rtol=0, atol=5e-6)
    out = model(ids, response_start=START)
    torch.testing.assert_close(model.score(alone).reward[:, None], out.logits, rtol=0, atol=5e-6)


@torch.no_grad()
def test_rows_of_several_lengths_read_their_own_response(make_model):
    model, ids = make_model(), tokens(3, 12)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    mask[1, :5] = 0
    start = torch.tensor([8, 0, 4])
    alone = [
        model.features(ids[:1, :9], response_start=start[:1]),
        model.features(ids[1:2, 5:], response_start=start[1:2]),
        model.features(ids[2:], response_start=start[2:]),
    ]
    torch.testing.assert_close(model.features(ids, mask, start), torch.cat(alone), rtol=0, atol=5e-6)


@torch.no_grad()
def test_a_token_that_heads_skip_at_the_end_is_no_part_of_the_response(make_model):
    model, ids = make_model(skip_token_id=7), tokens(2, 10)
    ids[:, 8:] = 7
    start = torch.tensor([3, 8])  # of the second, nothing but skipped tokens is left: the last that is read
    short = model.features(ids[:, :8], response_start=torch.tensor([3, 7]))
    torch.testing.assert_close(model.features(ids, response_start=start), short, rtol=0, atol=5e-6)


@pytest.mark.filterwarnings("ignore:.*longer than the trunk's")
@torch.no_grad()
def test_taps_of_a_text_do_not_depend_on_the_longest_text_beside_it():
    trunk, switch = long_trunk("dynamic")
    model = EnsembleRewardModel.from_trunk(trunk, taps="wide")
    lengths = [switch + 7, switch - 9, switch + 1]
    ids = tokens(3, max(lengths))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    start = torch.tensor([5, 50, 0])
    together = model.features(ids, mask, start)
    for row, length in enumerate(lengths):
        alone = model.features(ids[row : row + 1, :length], None, start[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_gradient_checkpointing_gives_the_same_gradients(make_model, family, reentrant):
    model = make_model(family)
    plain = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for each in (model, plain):
        each.train()
        for module in each.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        each(tokens(2, 10), response_start=START).logits.sum().backward()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_lora_trains_under_every_tap(make_model):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], modules_to_save=["score"], r=4)
    model = peft.get_peft_model(make_model(taps=["mean:1"]), lora)
    model(input_ids=tokens(2, 10), response_start=START).logits.sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("layers.0." in name for name in moved)
    assert not any("layers.1." in name for name in moved)  # behind the one tap


def test_saving_and_loading_keeps_taps_and_reward(make_model, tmp_path):
    model = make_model(taps="wide")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["taps"] == ["last:2", "mean:1"]
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is EnsembleRewardModel
    assert loaded.score.hidden_size == loaded.config.feature_size == 64
    ids = tokens(2, 10)
    assert torch.equal(loaded(ids, response_start=START).logits, model(ids, response_start=START).logits)


@pytest.mark.parametrize("taps", [None, "last", ["last:-1"], ["last:2"]])
def test_the_trunks_output_alone_is_todays_model_on_disk_and_has_no_hooks(make_model, tmp_path, taps, monkeypatch):
    model = make_model(taps=taps)
    model.save_pretrained(tmp_path)
    assert "taps" not in json.loads((tmp_path / "config.json").read_text())
    monkeypatch.setattr(torch.nn.Module, "register_forward_pre_hook", lambda *_, **__: pytest.fail("a hook"))
    ids = tokens(2, 10)
    assert torch.equal(model(ids, response_start=START).logits, model(ids).logits)


@torch.no_grad()
def test_taps_at_the_pooled_token_need_no_response(make_model):
    model, ids = make_model(taps=["last:1", "last:2"]), tokens(2, 10)
    states = model.model(input_ids=ids, output_hidden_states=True).hidden_states
    both = torch.cat([states[1][:, -1], states[2][:, -1]], dim=1)
    torch.testing.assert_close(model.features(ids), both, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (None, r"response_start: expected where each response begins, because this model reads .*\(.*mean:1.*\), "
               r"got None: where only token ids are known, as in TRL's trainers, use a model .* features=last"),
        (torch.tensor([0]), r"response_start: expected \[2\] int64, got \[1\] int64"),
        (torch.tensor([0.0, 1.0]), r"response_start: expected \[2\] int64, got \[2\] float32"),
        (torch.tensor([4, 10]), r"among the attended ones of its row, counted from 0, got 10 in row 1"),
        (torch.tensor([-1, 3]), r"counted from 0, got -1 in row 0"),
    ],
)  # fmt: skip
def test_a_response_that_cannot_be_found_is_refused(make_model, start, message):
    with pytest.raises(ValueError, match=message):
        make_model()(tokens(2, 10), response_start=start)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"taps": "wider"}, "EnsembleRewardConfig: taps: expected last, wide, or a list of taps .*'wider'"),
        ("llama", {"taps": ["mean:3"]}, r"EnsembleRewardConfig: taps: expected a layer from 0 to 2 .*'mean:3'"),
        ("bert", {"taps": "wide", "pooling": "pooler"}, "pooling: expected last or first with taps, .* got pooler"),
        ("llama", {"taps": "wide", "head": EnsembleHead(32, 3)}, "head: expected hidden_size 64, got 32"),
    ],
)
def test_taps_that_cannot_be_read_are_refused(tiny_trunk, family, options, message):
    with pytest.raises(ValueError, match=message):
        EnsembleRewardModel.from_trunk(tiny_trunk(family), **options)


def test_taps_without_a_trunk_are_refused():
    with pytest.raises(ValueError, match="taps: expected none without a text_config, got 'wide'"):
        EnsembleRewardConfig(taps="wide")


@pytest.mark.slow
@torch.no_grad()
def test_every_text_trunk_that_builds_small_gives_its_own_states_or_is_refused() -> None:
    found, other, refused = [], [], {}
    for kind in set(text_families()) - SLOW:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trunk = small_trunk(kind)
        if trunk is None or trunk.config.is_encoder_decoder:
            continue
        ids, start = tokens(2, 11), torch.tensor([4, 0])
        try:
            model = EnsembleRewardModel.from_trunk(trunk, taps=["mean:1"], num_heads=1)
            got = model.features(ids, response_start=start)
        except ValueError as error:
            refused[kind] = str(error)
            continue
        options = {"use_cache": False} if "use_cache" in inspect.signature(trunk.forward).parameters else {}
        options |= {"attention_mask": torch.ones_like(ids), "output_hidden_states": True}
        states = trunk(input_ids=ids, **options).hidden_states
        if len(states) != num_layers(trunk) + 1:
            other.append(kind)
            continue
        want = torch.stack([states[1][row, begin:].float().mean(0) for row, begin in enumerate(start.tolist())])
        same = torch.allclose(got.float(), want, atol=1e-4 * float(want.abs().max()))
        (found if same else other).append(kind)
    assert {"llama", "qwen3", "gemma2", "bert", "roberta", "gpt2", "gpt_neox", "mpnet"} <= set(found)
    assert all("taps: expected" in why or "config.hidden_size" in why for why in refused.values()), refused
    assert {"albert", "gemma3n_text", "xlnet", "squeezebert"} <= set(refused)
    # they count their own hidden_states otherwise; ours is what the second block gets
    assert set(other) <= {"mamba", "mamba2", "falcon_mamba", "rwkv", "longcat_flash", "dory", "xlstm"}, other
    assert len(found) > 100
