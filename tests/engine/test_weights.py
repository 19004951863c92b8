"""Weights that are cut short, of another shape or incomplete are refused in one sentence."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from prudent.engine import EnsembleRewardModel


def _cut_safetensors(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _cut_bin(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-100])


def _empty_bin(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").touch()


def _other_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t[..., :16].contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("breaks", [_cut_safetensors, _cut_bin, _empty_bin, _other_shape])
@pytest.mark.parametrize("load", ["from_trunk", "from_sequence_classifier", "from_pretrained"])
def test_weights_that_cannot_be_read_are_one_sentence_with_the_folder(make_classifier, tmp_path, breaks, load):
    original = make_classifier()
    if load == "from_pretrained":
        original = EnsembleRewardModel.from_sequence_classifier(original)
    original.save_pretrained(tmp_path)
    breaks(tmp_path)
    with pytest.raises(ValueError, match=r": its weights cannot be read \(.+\)$") as raised:
        getattr(EnsembleRewardModel, load)(tmp_path)
    assert str(raised.value).startswith(str(tmp_path))
    assert "\n" not in str(raised.value)
    if breaks is _other_shape:
        assert "(their shapes differ from those of its config.json)" in str(raised.value)


def test_a_checkpoint_that_lacks_a_tensor_of_the_trunk_is_refused(causal_lm, tmp_path):
    causal_lm.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"from_trunk: .* got none for layers\.1\.mlp\.up_proj\.weight"):
        EnsembleRewardModel.from_trunk(str(tmp_path))
