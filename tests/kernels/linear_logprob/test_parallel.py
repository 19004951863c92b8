"""The vocabulary split over two gloo processes: as one process, forward and backward; refusals."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from prudent.kernels.linear_logprob import call as call_module
from prudent.kernels.linear_logprob import linear_logprob
from prudent.kernels.linear_logprob.configs import Plan

from .cases import call, gradients, make, some_grads

RANKS, V = 2, 38
BIAS = torch.linspace(-1, 1, V, dtype=torch.float64)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "capped and tempered": {"softcap": 4.0, "temperature": 0.6},
    "biased, some ignored": {"bias": BIAS, "ignored": (0, 3, 10), "softcap": 3.0},
    "all ignored": {"ignored": tuple(range(11))},
}
KEPT = {"default": None, "nothing": 0, "some rows": 3 * 8 * V // 2, "all rows": 10**6}
UPSTREAMS = {"logprob": (0,), "all": (0, 1, 2)}

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
    pytest.mark.slow,
]


def _upstream(name: str, inputs: Any) -> tuple[Tensor | None, ...]:
    return tuple(g if i in UPSTREAMS[name] else None for i, g in enumerate(some_grads(inputs)))


def _each() -> Any:
    return (
        (case, kept, upstream, frozen)
        for case in CASES for kept in KEPT for upstream in UPSTREAMS for frozen in (False, True)
    )  # fmt: skip


def _shard(inputs: Any, rank: int) -> Any:
    part = slice(rank * V // RANKS, (rank + 1) * V // RANKS)
    return inputs._replace(weight=inputs.weight[part], bias=None if inputs.bias is None else inputs.bias[part])


def _said(run: Any) -> str:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _refusals(rank: int) -> list[str]:
    inputs = _shard(make(v=V), rank)
    group = dist.group.WORLD

    def compiled() -> None:
        torch.compile(lambda i: call(i, group=group).logprob, fullgraph=True, backend="eager")(inputs)

    meta = inputs._replace(**{name: getattr(inputs, name).to("meta") for name in ("hidden", "weight", "target")})
    return [
        _said(lambda: call(inputs._replace(weight=inputs.weight[rank:]), group=group)),
        _said(lambda: call(inputs._replace(target=inputs.target + V), group=group)),
        _said(lambda: call(meta, group=group)),
        _said(compiled),
    ]


def _work(rank: int, folder: str) -> None:
    """One rank: save outputs and gradients of every case."""
    try:
        call_module.plan = lambda *shapes: Plan(4, 16, 2)
        call_module.kept_columns = lambda *shapes: 16
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
        found: dict[Any, Any] = {}
        for case, kept, upstream, frozen in _each():
            inputs = make(v=V, **CASES[case])
            shard, grads = _shard(inputs, rank), _upstream(upstream, inputs)
            run = lambda i, kept=kept: call(i, keep_bytes=KEPT[kept], group=dist.group.WORLD)  # noqa: E731
            with torch.no_grad():
                outputs = tuple(run(shard))
            found[case, kept, upstream, frozen] = (*outputs, *gradients(shard, grads, run, frozen))
        inputs = _shard(make(v=V, dtype=torch.bfloat16), rank)
        run = lambda i: call(i, group=dist.group.WORLD)  # noqa: E731
        found["bf16"] = (*run(inputs), gradients(inputs, some_grads(inputs), run)[0])
        found["refusals"] = _refusals(rank)
        torch.save(found, f"{folder}/{rank}.pt")
        dist.destroy_process_group()
    except Exception:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        raise


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    context = torch.multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_work, args=(rank, str(folder)), daemon=True) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
    errors = "\n".join(path.read_text() for path in folder.glob("*.error"))
    assert [process.exitcode for process in ranks] == [0] * RANKS, errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_two_ranks_are_one_process(found: list[dict[Any, Any]], case: str, upstream: str, frozen: bool) -> None:
    """Outputs, hidden's gradient, and the ranks' parts of the weight's and the bias's, whatever is kept."""
    inputs = make(v=V, **CASES[case])
    expected = (*call(inputs), *gradients(inputs, _upstream(upstream, inputs), call, frozen))
    for kept in KEPT:
        parts = [ranks[case, kept, upstream, frozen] for ranks in found]
        joined = (*parts[0][:4], *(torch.cat(pair) for pair in zip(*(p[4:] for p in parts), strict=True)))
        for ours, theirs in zip(joined, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        for a, b in zip(parts[0][:4], parts[1][:4], strict=True):
            assert torch.equal(a, b)  # the same bits on every rank


def test_in_bf16_the_ranks_have_the_same_bits_and_one_rounding(found: list[dict[Any, Any]]) -> None:
    for a, b in zip(found[0]["bf16"], found[1]["bf16"], strict=True):
        assert torch.equal(a, b)
    inputs = make(v=V, dtype=torch.bfloat16)
    whole = gradients(inputs, some_grads(inputs))[0]
    torch.testing.assert_close(found[0]["bf16"][3], whole, rtol=2**-7, atol=2**-7 * whole.abs().max().item())


@pytest.mark.parametrize(("number", "says"), [
    (0, "ValueError: linear_logprob: weight: expected the same number of rows on every rank of the group, got [19, 1"),
    (1, "ValueError: linear_logprob: target: expected values in [0, 38) or -100 (ignore_index), got"),
    (2, "ValueError: linear_logprob: group: expected None unless hidden, weight and target are plain tensors"),
    (3, "linear_logprob: a process group is not supported under torch.compile; call it outside"),
])  # fmt: skip
def test_refused_in_words(found: list[dict[Any, Any]], number: int, says: str) -> None:
    for ranks in found:
        assert says in ranks["refusals"][number]


def test_a_group_is_a_process_group() -> None:
    inputs = make()
    with pytest.raises(ValueError, match=r"linear_logprob: group: expected a torch.distributed.ProcessGroup or None"):
        linear_logprob(*inputs[:3], group=-100)  # type: ignore[arg-type]
