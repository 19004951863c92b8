"""Other libraries' ops beside `linear_logprob`: each is optional, and its gradients are taken as its kind asks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prudent.bench.ops import linear_logprob

CUDA = torch.device("cuda")  # peers asks for its type only


def summed(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target, reduction="sum")


def missing(package: str) -> Callable[[], Any]:
    def load() -> Any:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    return load


def of_another_torch() -> Any:
    raise AttributeError("module 'torch' has no attribute 'gone'")


def tensors() -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    hidden, weight, target = linear_logprob._tensors(6, 8, 11, "fp32", torch.Generator().manual_seed(0))
    return hidden.requires_grad_(), weight.requires_grad_(), target, (torch.ones(6), torch.full((6,), 0.5))


def test_one_peer_that_is_missing_or_fails_to_import_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_logprob, "PEERS", {
        "absent": ("absent", missing("absent")), "old": ("old", of_another_torch), "fine": ("fine", lambda: summed),
        "half": ("half", missing("its_compiler")),
    })  # fmt: skip
    found, notes = linear_logprob.peers(CUDA, None)
    assert list(found) == ["fine"]
    assert notes == [
        "absent: not installed", "old: AttributeError: module 'torch' has no attribute 'gone'",
        "half: ModuleNotFoundError: No module named 'its_compiler'",
    ]  # fmt: skip


def test_a_loss_is_differentiated_alone_and_an_op_with_entropy_by_both(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = {"loss": ("a", lambda: summed), "verl": ("b", lambda: linear_logprob.composed)}
    monkeypatch.setattr(linear_logprob, "PEERS", loads)
    hidden, weight, target, upstream = tensors()
    found, _ = linear_logprob.peers(CUDA, upstream)
    alone = torch.autograd.grad(summed(hidden, weight, target), (hidden, weight))
    both = linear_logprob._gradients(linear_logprob.composed, upstream, hidden, weight, target)
    for name, expected in (("loss", alone), ("verl", both)):
        for ours, theirs in zip(found[name](hidden, weight, target), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_verls_op_is_reached_without_what_its_package_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = tmp_path / "verl" / "utils" / "kernel"
    kernel.mkdir(parents=True)
    for folder in (tmp_path / "verl", tmp_path / "verl" / "utils", kernel):
        (folder / "__init__.py").write_text("import ray_that_is_not_here")
    (kernel / "kernels.py").write_text("")
    (kernel / "linear_cross_entropy.py").write_text(
        "def linear_cross_entropy(hidden, weight, labels, temperature, reduction):\n"
        "    assert (temperature, reduction) == (1.0, 'none')\n    return 'logprob', 'entropy'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in linear_logprob.sys.modules if name.partition(".")[0] == "verl"]:
        monkeypatch.delitem(linear_logprob.sys.modules, name)
    assert linear_logprob._verl()(None, None, None) == ("logprob", "entropy", None)
    for name in [name for name in linear_logprob.sys.modules if name.partition(".")[0] == "verl"]:
        del linear_logprob.sys.modules[name]


def test_on_a_cpu_there_are_no_peers() -> None:
    assert linear_logprob.peers(torch.device("cpu"), None) == ({}, [])
