"""Every public op in a CUDA graph: compiled whole, tagged as safe, and without a wait of the host on its CUDA path.

The CUDA paths run here on tensors without data while Triton's launches are recorded: an operation whose result the host
must read raises there, and the list of operations is searched for it. On a GPU each op is compiled with
mode="reduce-overhead" and replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import prudent

pytest.importorskip("triton", reason="triton is not installed")

from prudent.bench import aot
from prudent.bench.logprob_cost import as_on_a_gpu
from prudent.kernels.launch import recording
from prudent.kernels.linear_logprob import triton as logprob
from prudent.kernels.linear_logprob.contract import DERIVATIVE, Inputs, Needs, OutputGrads, Saved

WAITS = ("nonzero", "_local_scalar_dense", "masked_select", "is_nonzero", "unique", "equal", "_to_cpu")


class Recorder(TorchDispatchMode):
    """The operations that a graph cannot hold: those that make the host wait, and those with a CPU tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        by_mask = "index" in name and any(t.dtype in (torch.bool, torch.uint8) for t in tensors)
        from_cpu = any(t.device.type == "cpu" for t in tensors)
        if name.partition(".")[0] in WAITS or by_mask or from_cpu:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("run", [
    lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.sum().item(), lambda x: bool((x > 0).any()),
    lambda x: torch.masked_select(x, x > 0),
], ids=["nonzero", "index by a mask", "item", "bool", "masked_select"])  # fmt: skip
def test_the_recorder_finds_a_wait(run: Callable[[Tensor], Any]) -> None:
    with Recorder() as recorder:
        run(torch.ones(3))
    assert any(name.partition(".")[0] in (*WAITS, "index") for name in recorder.found)


@pytest.mark.parametrize("op", ["ensemble_reward", "advantages", "preference_step"])
def test_the_cuda_path_never_waits(op: str) -> None:
    for _, run in aot._shipped(op).shipped("sm_90", False):
        with Recorder() as recorder, recording() as launches:
            run()
        assert launches
        assert recorder.found == []


@pytest.mark.parametrize("ignore_index", [None, -100])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("keep", [0, DERIVATIVE, 10**6])
def test_linear_logprobs_cuda_path_never_waits(ignore_index: int | None, trained: bool, keep: int) -> None:
    """Forward and backward of 100 rows over a vocabulary of 5000, with a bias and a cap."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    hidden, target = empty(4, 30, 64)[:, :25], empty(4, 25, dtype=torch.int64)  # rows that cannot be viewed as [T, D]
    inputs = Inputs(hidden, empty(5000, 64), target, 0.7, 30.0, ignore_index, empty(5000))
    outer = empty(4, 25, dtype=torch.float32)
    with as_on_a_gpu(), Recorder() as recorder, recording() as launches:
        assert logprob.scored_rows(inputs) is None
        results = logprob.forward(inputs, None, keep)
        for grads in (OutputGrads(outer, None, None), OutputGrads(outer, outer, outer)):
            logprob.backward(grads, inputs, None, Saved(*results[1:], keep), Needs(True, trained, trained))
    assert {launch.kernel.__name__ for launch in launches} == {"statistics_kernel", "gradient_kernel"}
    assert recorder.found == []


def names() -> list[str]:
    """Every registered op of ours, the native ones included."""
    return sorted(
        n.removeprefix("prudent::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("prudent::")
    )


def test_no_op_is_tagged_unsafe_for_cuda_graphs() -> None:
    assert {"ensemble_reward", "linear_logprob", "advantages", "preference_step"} <= set(names())
    for name in names():
        operator, _, overload = name.partition(".")
        found = getattr(getattr(torch.ops.prudent, operator), overload or "default")
        assert torch.Tag.cudagraph_unsafe not in found.tags


def calls(device: str) -> dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]]:
    """A call of each op, in which inductor has nothing to generate, and its arguments."""
    g = torch.Generator().manual_seed(0)
    hidden, heads = torch.randn(8, 32, generator=g), torch.randn(10, 32, generator=g)
    tokens, head = torch.randint(50, (8,), generator=g), torch.randn(50, 32, generator=g)
    tokens[2] = -100
    table = torch.randn(4, 7, generator=g)
    given: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
        "ensemble_reward": (lambda h, w: prudent.ensemble_reward(h, w).reward, (hidden, heads)),
        "linear_logprob": (lambda h, w, t: prudent.linear_logprob(h, w, t).logprob, (hidden, head, tokens)),
        "advantages": (
            lambda s, p, m: prudent.advantages(s, p, p, p, m).advantage,
            (torch.randn(4, generator=g), table, torch.ones(4, 7, dtype=torch.bool)),
        ),
        "preference_step": (
            lambda f, w, b: prudent.preference_step(f, w, b).loss,
            (hidden, heads, torch.zeros(10)),
        ),
    }
    return {name: (call, tuple(t.to(device) for t in tensors)) for name, (call, tensors) in given.items()}


@pytest.mark.slow
@pytest.mark.parametrize("op", ["ensemble_reward", "linear_logprob", "advantages", "preference_step"])
def test_compiled_whole_to_reduce_overhead(op: str) -> None:
    """On a CPU, where the mode has no graph to record: no break, and the eager result."""
    call, tensors = calls("cpu")[op]
    torch._dynamo.reset()
    compiled = torch.compile(call, mode="reduce-overhead", fullgraph=True)
    assert torch.equal(compiled(*tensors), call(*tensors))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("op", ["ensemble_reward", "linear_logprob", "advantages", "preference_step"])
def test_a_recorded_graph_replays_with_new_values(op: str) -> None:
    """Inductor records a graph in the third call at the latest; with changed values it gives the eager result."""
    from torch._dynamo.utils import counters

    call, tensors = calls("cuda")[op]
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(call, mode="reduce-overhead", fullgraph=True)
    for number in range(5):
        changed = tuple(t * (1 + number) if t.is_floating_point() else t for t in tensors)
        torch.testing.assert_close(compiled(*changed).clone(), call(*changed))
    assert counters["inductor"]["cudagraph_skips"] == 0
