"""The public op: equal results eager, registered, compiled and exported; edges; wrong input refused by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.library import opcheck

from prudent.kernels.advantages import AdvantageOutput, advantages, cpu, op, reference
from prudent.kernels.advantages.contract import Inputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INF = float("inf")
PLAIN = (0.97, 0.9, 0.2, "k3", 10.0, "skip", "last", "sample")


@pytest.fixture
def make_batch(make_batch: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *sizes, **options: tuple(t.to(DEVICE) for t in make_batch(*sizes, **options))


def tensors_of(out: AdvantageOutput) -> list[torch.Tensor]:
    return [*out[:4], *out.stats]


def assert_same(ours: AdvantageOutput, theirs: AdvantageOutput) -> None:
    for a, b in zip(tensors_of(ours), tensors_of(theirs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("critic", [True, False])
def test_the_registered_op_passes_opcheck_and_is_not_differentiable(
    make_batch: Callable[..., Any], critic: bool
) -> None:
    score, logprob, ref_logprob, value, mask = make_batch("holes", dtype=torch.float32)
    value = value.nan_to_num().requires_grad_() if critic else None
    logprob = logprob.nan_to_num().requires_grad_()
    opcheck(torch.ops.prudent.advantages.default, (score, logprob, ref_logprob.nan_to_num(), value, mask, *PLAIN))
    assert not any(t.requires_grad for t in torch.ops.prudent.advantages(score, logprob, logprob, value, mask, *PLAIN))


def test_outputs_carry_no_gradient_whatever_the_inputs_do(make_batch: Callable[..., Any]) -> None:
    *floats, mask = make_batch("holes", dtype=torch.float32)
    with_gradient = advantages(*(t.requires_grad_() for t in floats), mask)
    assert not any(t.requires_grad for t in tensors_of(with_gradient))
    assert_same(with_gradient, advantages(*(t.detach() for t in floats), mask))


def test_compiled_whole_with_dynamic_batch_and_length(make_batch: Callable[..., Any]) -> None:
    def run(*batch: torch.Tensor) -> AdvantageOutput:
        return advantages(*batch, kl_estimator="k3", kl_clip=10.0)

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sequences, length in ((4, 9), (7, 5), (3, 30)):
            batch = make_batch("holes", batch=sequences, length=length, dtype=torch.float32)
            assert_same(compiled(*batch), run(*batch))


def test_exported_with_dynamic_batch_and_length(make_batch: Callable[..., Any]) -> None:
    class Advantages(torch.nn.Module):
        def forward(self, *batch: torch.Tensor) -> torch.Tensor:
            return advantages(*batch).advantage

    b, t = torch.export.Dim("b"), torch.export.Dim("t")
    shapes = (({0: b}, *[{0: b, 1: t}] * 4),)
    program = torch.export.export(Advantages(), make_batch("holes", dtype=torch.float32), dynamic_shapes=shapes)
    assert "prudent.advantages" in str(program.graph)
    other = make_batch("left", batch=9, length=4, dtype=torch.float32)
    assert torch.equal(program.module()(*other), advantages(*other).advantage)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_floating_dtype_comes_out_wide_and_may_be_mixed(
    make_batch: Callable[..., Any], dtype: torch.dtype
) -> None:
    *floats, mask = make_batch("holes", dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = advantages(*floats, mask)
    assert {t.dtype for t in (*out[:3], *out.stats)} == {wide}
    assert_same(out, advantages(*(t.to(wide) for t in floats), mask))
    mixed = advantages(floats[0].float(), *floats[1:3], floats[3].to(torch.float16), mask)
    assert mixed.advantage.dtype == wide


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_an_integer_mask_is_its_boolean(make_batch: Callable[..., Any], dtype: torch.dtype) -> None:
    *floats, mask = make_batch("holes")
    assert_same(advantages(*floats, mask.to(dtype)), advantages(*floats, mask))


def test_views_expanded_and_transposed_tensors_are_read_where_they_lie(make_batch: Callable[..., Any]) -> None:
    score, logprob, ref_logprob, value, mask = make_batch("right", dtype=torch.float32)
    wide = torch.full((6, 20), float("nan"), device=DEVICE)
    wide[:, 3:16] = value
    strided = (
        score[:1].expand(6), logprob.T.contiguous().T, ref_logprob[:1].expand(6, 13), wide[:, 3:16],
        torch.stack([mask, ~mask], 2)[:, :, 0],
    )  # fmt: skip
    assert_same(advantages(*strided), advantages(*(t.clone(memory_format=torch.contiguous_format) for t in strided)))
    one = torch.ones(1, 1, device=DEVICE).expand(6, 13)
    full = torch.ones(6, 13, dtype=torch.bool, device=DEVICE)
    assert_same(advantages(score, one, one, one, full), advantages(score, *[one.contiguous()] * 3, full))


def test_nothing_is_changed_in_place(make_batch: Callable[..., Any]) -> None:
    batch = make_batch("holes", dtype=torch.float32)
    before = [t.clone() for t in batch]
    advantages(*batch)
    for a, b in zip(batch, before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (3, 0), (0, 0)])
def test_an_empty_batch_gives_empty_outputs_and_zero_statistics(batch: int, length: int) -> None:
    tokens = torch.zeros(batch, length, device=DEVICE)
    out = advantages(tokens.new_zeros(batch), tokens, tokens, tokens, tokens.bool())
    assert [t.shape for t in out[:4]] == [(batch, length)] * 3 + [(batch,)]
    assert [float(x) for x in out.stats] == [0.0] * 6
    assert not out.dropped.any()


@pytest.mark.parametrize("score_at", ["last", "after"])
def test_a_sequence_without_a_token_is_zero_and_does_not_count(
    make_batch: Callable[..., Any], score_at: str, poisoned_empty: None
) -> None:
    *floats, mask = make_batch("full")
    mask[2] = False
    floats[0][2] = float("nan")
    out = advantages(*floats, mask, score_at=score_at)
    others = [0, 1, 3, 4, 5]
    rest = advantages(*(t[others] for t in floats), mask[others], score_at=score_at)
    for ours, theirs in zip(out[:3], rest[:3], strict=True):
        assert not ours[2].any()
        torch.testing.assert_close(ours[others], theirs, rtol=1e-13, atol=1e-13)
    assert not out.dropped.any()
    assert (out.stats.tokens, out.stats.sequences) == (5 * 13, 5)


@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
@pytest.mark.parametrize("where", ["score", "logprob", "value"])
def test_a_value_that_is_not_finite_drops_its_own_sequence_and_no_other(
    make_batch: Callable[..., Any], where: str, value: float, poisoned_empty: None
) -> None:
    batch = make_batch("full")
    bad = batch[("score", "logprob", "ref_logprob", "value").index(where)]
    bad[(1, 4) if bad.dim() == 2 else 1] = value
    out = advantages(*batch)
    assert out.dropped.tolist() == [False, True, False, False, False, False]
    others = [0, 2, 3, 4, 5]
    rest = advantages(*(t[others] for t in batch))
    for ours, theirs in zip(out[:3], rest[:3], strict=True):
        assert not ours[1].any()
        torch.testing.assert_close(ours[others], theirs, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(torch.stack(out.stats)[3:], torch.stack(rest.stats)[3:], rtol=1e-13, atol=1e-13)
    assert out.stats.dropped == 1


def test_an_impossible_token_is_clipped_like_any_other() -> None:
    """k3 of a token of probability 0 is infinite, and 10 once clipped, as OpenRLHF's and verl's."""
    logprob, zero = torch.tensor([[-INF, 0.0]], device=DEVICE), torch.zeros(1, 2, device=DEVICE)
    mask = torch.ones(1, 2, dtype=torch.bool, device=DEVICE)
    out = advantages(zero[:, 0], logprob, zero, None, mask, kl_coef=0.5, kl_estimator="k3", kl_clip=10.0)
    assert out.reward.tolist() == [[-5.0, 0.0]]
    assert advantages(zero[:, 0], logprob, zero, None, mask, kl_estimator="k3").dropped.item()


@pytest.mark.parametrize(("whiten", "ddof"), [("sample", 1), ("population", 0)])
def test_whitened_over_unmasked_tokens_alone(make_batch: Callable[..., Any], whiten: str, ddof: int) -> None:
    batch = make_batch("holes", batch=20)
    out = advantages(*batch, whiten=whiten)
    taken = out.advantage[batch[4]]
    assert taken.mean().item() == pytest.approx(0, abs=1e-14)
    assert taken.var(correction=ddof).item() == pytest.approx(1, rel=1e-7)
    raw = advantages(*batch, whiten="none").advantage[batch[4]]
    torch.testing.assert_close(out.stats.mean, raw.mean())
    torch.testing.assert_close(out.stats.std, raw.std(correction=ddof))


@pytest.mark.parametrize("whiten", ["none", "centre", "sample", "population"])
def test_one_token_in_all_has_nothing_to_whiten_with(whiten: str) -> None:
    one = torch.ones(1, 1, device=DEVICE)
    out = advantages(one[0], one, one, one * 0, one.bool(), whiten=whiten)
    assert out.advantage.item() == (1.0 if whiten == "none" else 0.0)
    assert (out.stats.tokens, out.stats.std) == (1, 0)


@pytest.mark.parametrize(("gamma", "lam"), list(itertools.product([0.0, 1.0], [0.0, 1.0])))
@pytest.mark.parametrize("holes", ["skip", "zero"])
def test_the_ends_of_gamma_and_lam(make_batch: Callable[..., Any], gamma: float, lam: float, holes: str) -> None:
    score, logprob, ref_logprob, value, mask = make_batch("right")
    out = advantages(score, logprob, ref_logprob, value, mask, gamma=gamma, lam=lam, holes=holes, whiten="none")
    v, r = torch.where(mask, value, 0), out.reward
    following = torch.cat([v[:, 1:], v.new_zeros(6, 1)], 1)
    expected = {
        (0.0, 0.0): r - v,
        (0.0, 1.0): r - v,
        (1.0, 0.0): r + following - v,
        (1.0, 1.0): r.flip(1).cumsum(1).flip(1) - v,
    }[gamma, lam]
    torch.testing.assert_close(out.advantage, torch.where(mask, expected, 0), rtol=1e-12, atol=1e-12)


def test_without_a_critic_the_advantage_is_the_reward_to_go_and_lam_is_not_read(make_batch: Callable[..., Any]) -> None:
    score, logprob, ref_logprob, value, mask = make_batch("holes")
    runs = [advantages(score, logprob, ref_logprob, None, mask, gamma=0.9, lam=lam, whiten="none") for lam in (0.1, 1)]
    assert_same(*runs)
    assert torch.equal(runs[0].advantage, runs[0].returns)
    zero = torch.zeros_like(value)
    assert_same(runs[0], advantages(score, logprob, ref_logprob, zero, mask, gamma=0.9, lam=1.0, whiten="none"))


def test_a_score_for_every_token(make_batch: Callable[..., Any]) -> None:
    score, logprob, ref_logprob, value, mask = make_batch("holes")
    length = mask.shape[1]
    last = length - 1 - mask.flip(1).int().argmax(1)
    spread = torch.full_like(value, float("nan"))  # what stands under the mask is not read
    spread[mask] = 0
    spread[torch.arange(6, device=DEVICE), last] = score
    assert_same(
        advantages(spread, logprob, ref_logprob, value, mask), advantages(score, logprob, ref_logprob, value, mask)
    )
    dense = torch.randn(6, length, dtype=torch.float64, device=DEVICE)
    out = advantages(dense, None, None, value, mask, kl_coef=0.0)
    assert torch.equal(out.reward, torch.where(mask, dense, 0))


@pytest.mark.skipif(not cpu.available(), reason="the native CPU library is not built")
def test_both_cpu_executions_are_reached(make_batch: Callable[..., Any]) -> None:
    inputs = Inputs(*(t.cpu() for t in make_batch("holes")), *PLAIN)
    assert op._backend(inputs) is cpu
    for ours, theirs in zip(cpu.forward(inputs), reference.forward(inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


B, T = 4, 6
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"mask": None}, "mask: expected a tensor, got NoneType"),
    ({"mask": torch.ones(B, T)}, "mask: expected dtype bool or an integer dtype, got torch.float32"),
    ({"mask": torch.ones(B, dtype=torch.bool)}, r"mask: expected shape \[B, T\], got \[4\]"),
    ({"score": 1.0}, "score: expected a tensor, got float"),
    ({"score": torch.zeros(B + 1)}, r"score: expected shape \[4\] or \[4, 6\], as mask's, got \[5\]"),
    ({"score": torch.zeros(B, 1)}, r"score: expected shape \[4\] or \[4, 6\]"),
    ({"score": torch.zeros(B, dtype=torch.int64)}, "score: expected dtype bfloat16, float16, float32 or float64"),
    ({"logprob": torch.zeros(B, T + 1)}, r"logprob: expected shape \[4, 6\], as mask's, got \[4, 7\]"),
    ({"logprob": None}, "logprob: expected a tensor like the other log-probabilities, or both None"),
    ({"ref_logprob": None}, "ref_logprob: expected a tensor like the other log-probabilities, or both None"),
    ({"ref_logprob": "text"}, "ref_logprob: expected a tensor or None, got str"),
    ({"logprob": None, "ref_logprob": None}, "kl_coef: expected 0 without logprob and ref_logprob, got 0.05"),
    ({"value": torch.zeros(B)}, r"value: expected shape \[4, 6\]"),
    ({"value": torch.zeros(B, T, dtype=torch.bool)}, "value: expected dtype .* got torch.bool"),
    ({"value": torch.zeros(B, T, device="meta")}, r"value: expected device cpu \(mask's\), got meta"),
    ({"gamma": 1.01}, r"gamma: expected a number in \[0, 1\], got 1.01"),
    ({"gamma": float("nan")}, "gamma: expected a number"),
    ({"lam": -0.1}, r"lam: expected a number in \[0, 1\], got -0.1"),
    ({"lam": "0.9"}, r"lam: expected a number in \[0, 1\]"),
    ({"kl_coef": -0.1}, "kl_coef: expected a finite number >= 0, got -0.1"),
    ({"kl_coef": INF}, "kl_coef: expected a finite number >= 0"),
    ({"kl_clip": 0.0}, "kl_clip: expected a number above 0, or None"),
    ({"kl_clip": float("nan")}, "kl_clip: expected a number above 0"),
    ({"kl_estimator": "k4"}, "kl_estimator: expected one of k1, k2, k3, abs, got 'k4'"),
    ({"holes": "trl"}, "holes: expected one of skip, zero, got 'trl'"),
    ({"score_at": "end"}, "score_at: expected one of last, after, got 'end'"),
    ({"whiten": True}, "whiten: expected one of none, centre, sample, population, got True"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(REFUSED)])
def test_refused_with_argument_expectation_and_what_came(changes: dict[str, Any], says: str) -> None:
    tokens = torch.zeros(B, T)
    given: dict[str, Any] = {"score": torch.zeros(B), "logprob": tokens, "ref_logprob": tokens, "value": tokens}
    with pytest.raises(ValueError, match=f"^advantages: {says}"):
        advantages(**{**given, "mask": tokens.bool(), **changes})


def test_the_registered_op_refuses_with_the_same_words_even_on_fake_tensors() -> None:
    tokens = torch.zeros(B, T)
    bad = (torch.zeros(B + 1), tokens, tokens, tokens, tokens.bool(), *PLAIN)
    with pytest.raises(ValueError, match=r"advantages: score: expected shape"):
        torch.ops.prudent.advantages(*bad)
    with (
        torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(ValueError, match=r"advantages: score: expected shape \[4\] or \[4, 6\]"),
    ):
        torch.ops.prudent.advantages(*bad)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("whiten", ["sample", "population"])
def test_scores_whose_squares_overflow_fp32_are_whitened(
    native: bool, whiten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(cpu, "available", lambda: False)
    score, mask = torch.tensor([1e25, -1e25], device=DEVICE), torch.ones(2, 2, dtype=torch.bool, device=DEVICE)
    out = advantages(score, None, None, None, mask, kl_coef=0.0, whiten=whiten)
    # two tokens of +1e25 and two of -1e25: the deviation over ddof 3, or over 4
    each = 1.0 if whiten == "population" else 0.75**0.5
    torch.testing.assert_close(out.advantage, each * score.sign()[:, None].expand(2, 2))
    assert out.stats.std.item() == pytest.approx(1e25 / each, rel=1e-5)
