"""A repeated call starts the kernel that Triton's launcher would start, with the same arguments, or goes through it.

A stand-in for the driver notes what reaches it; nothing is computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed")

from prudent.bench.fake_driver import Driver, Start, fake_gpu  # noqa: E402
from prudent.kernels import direct, replay  # noqa: E402
from prudent.kernels.ensemble_reward import EnsembleOutput, TrustRegion, configs, ensemble_reward  # noqa: E402
from prudent.kernels.ensemble_reward import triton as execution  # noqa: E402
from prudent.kernels.ensemble_reward.triton_forward import forward_kernel  # noqa: E402
from prudent.kernels.launch import launch, recording  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="under the interpreter nothing is launched")

K, D, N, STORED = 5, 512, 24, 40
NEW = {"reward", "mean_out", "std_out", "reward_sum", "distance", "saved", *execution._SCRATCH}  # in every call


@pytest.fixture
def gpu() -> Iterator[Driver]:
    with fake_gpu() as driver:
        yield driver


@pytest.fixture
def launched() -> Iterator[mock.Mock]:
    """Counts the calls that go through Triton's launcher."""
    with mock.patch.object(execution, "launch", wraps=launch) as counted:
        yield counted


def arguments(**given: Any) -> dict[str, Any]:
    """A call's arguments, all tensors new."""
    values: dict[str, Any] = {
        "hidden": torch.zeros(STORED, D, dtype=torch.bfloat16), "weight": torch.zeros(2 * K, D),
        "bias": torch.zeros(2 * K), "rows": torch.zeros(N, dtype=torch.int64),
        "norm_weight": torch.ones(D, dtype=torch.bfloat16), "seed": torch.tensor([7]),
    }  # fmt: skip
    return {**values, **given}


def region(directions: int) -> TrustRegion:
    shapes = (D,), (D,), (directions, D), (directions,), (1,), (1,)
    return TrustRegion(*(torch.ones(shape) for shape in shapes))


def call(given: dict[str, Any]) -> EnsembleOutput:
    with torch.no_grad():
        return ensemble_reward(**given)


def same(a: Start, b: Start, but: set[str]) -> None:
    """Equal starts, except for the addresses of what `but` names."""
    assert a[:4] == b[:4]
    for name, value in a.arguments.items():
        other = b.arguments[name]
        assert (value is None) == (other is None), name
        if name not in but:
            assert type(value) is type(other), name
            assert value == other, name


def groups() -> list[dict[str, Any]]:
    labels = torch.arange(N) // 4
    return [{}, {"centre": "batch"}, {"centre": "group", "group": 4}, {"centre": "group", "group": 3},
            {"centre": "group", "group": labels}]  # fmt: skip


AGGREGATIONS = [
    "tradeoff:0.4", "tradeoff:0.4,worst=batch", "nominal,nominal=relative_std", "mean", "min", "max", "median", "lcb:1",
    "uwo:0.5", "softmin:0.3", "cvar:0.4", "head:2", "batch_worst", "tradeoff:0.3,nominal=head:1,source=mean", "trust:1",
    "lcb:1,trust=3,from=1,power=1",
]  # fmt: skip


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_repeated_call_reaches_the_driver_as_by_tritons_launcher(
    aggregation: str, gpu: Driver, launched: mock.Mock
) -> None:
    """Every aggregation with every centring, with and without rows, seed, bias, norm, calibration and trust region."""
    flags = list(itertools.product((False, True), repeat=4))
    for i, centring in enumerate(groups()):
        for j, (rows, seed, norm, calibrated) in enumerate(flags):
            changes = {name: None for name, kept in (("rows", rows), ("seed", seed), ("norm_weight", norm)) if not kept}
            more: dict[str, Any] = {"std_ref": torch.ones(K), "aggregation": aggregation, **centring, **changes}
            if not rows:
                more["hidden"] = torch.zeros(N, D, dtype=torch.bfloat16)
            if calibrated:
                more |= {"shift": torch.zeros(K), "scale": torch.ones(K), "bias": None}
            if "trust" in aggregation or (i + j) % 3 == 0:
                more["trust"] = region((i + j) % 2 * 4)
            check_repeated(arguments(**more), gpu, launched)


def check_repeated(first: dict[str, Any], gpu: Driver, launched: mock.Mock) -> None:
    """A first call; a second with other tensors, repeated; and the second's tensors through Triton's launcher."""
    execution.forget()
    gpu.starts.clear()
    launched.reset_mock()
    second = {name: copied(value) for name, value in first.items()}
    call(first)
    out = call(second)
    assert launched.call_count == 1
    execution.forget()
    call(second)
    assert launched.call_count == 2
    plain, repeated, again = gpu.starts
    given = {start for start, value in plain.arguments.items() if value != again.arguments[start]} - NEW
    same(plain, repeated, NEW | given)
    same(repeated, again, NEW)
    made = repeated.arguments
    for name, tensor in (
        ("reward", out.reward),
        ("mean_out", out.mean),
        ("std_out", out.std),
        ("distance", out.distance),
    ):
        assert made[name] == (None if tensor is None else tensor.data_ptr())
    assert made["reward_sum"] == out.reward_sum.data_ptr()
    assert out.mean.shape == out.std.shape == (N, K)
    assert out.reward.shape == (N,)
    assert out.reward.dtype == out.mean.dtype == torch.float32


def copied(value: Any) -> Any:
    if isinstance(value, TrustRegion):
        return TrustRegion(*(tensor.clone() for tensor in value))
    return value.clone() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_so_it_does_for_every_type_and_with_gradients(dtype: torch.dtype, gpu: Driver, launched: mock.Mock) -> None:
    for _ in range(2):
        given = arguments(hidden=torch.zeros(STORED, D, dtype=dtype, requires_grad=True))
        output = ensemble_reward(**given)
    plain, repeated = gpu.starts
    same(plain, repeated, NEW | {"hidden", "weight", "bias", "rows", "norm_weight", "seed"})
    assert launched.call_count == 1
    assert repeated.arguments["saved"] is not None
    assert output.reward.requires_grad


def test_what_the_kernel_writes_to_does_not_overlap(gpu: Driver) -> None:
    given = arguments(trust=region(4), aggregation="mean,centre=group", group=torch.arange(N))
    call(given)
    (kept,) = execution._replays._known.values()
    with recording() as launches:
        call(given)
    sizes = {name: launches[0].arguments[name].nbytes for name in execution._SCRATCH
             if launches[0].arguments[name] is not None}  # fmt: skip
    assert set(sizes) == {"partials", "shares", "region_shares", "table"}
    names = [parameter.name for parameter in forward_kernel.params]
    taken = sorted((offset, offset + sizes[names[place]]) for place, offset in kept.scratch)
    assert len(taken) == len(sizes)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(taken))
    assert taken[-1][1] <= kept.scratch_bytes
    first, second = call(given), call(given)
    assert not {t.data_ptr() for t in first if t is not None} & {t.data_ptr() for t in second if t is not None}


CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "shape": lambda given: {"rows": torch.zeros(N + 1, dtype=torch.int64)},
    "stored rows": lambda given: {"hidden": torch.zeros(STORED + 1, D, dtype=torch.bfloat16)},
    "stride": lambda given: {"hidden": torch.zeros(STORED, 2, D, dtype=torch.bfloat16)[:, 0]},
    "dtype": lambda given: {"weight": given["weight"].bfloat16()},
    "alignment": lambda given: {"rows": torch.zeros(N + 1, dtype=torch.int64)[1:]},
    "absence": lambda given: {"seed": None},
    "aggregation": lambda given: {"aggregation": "median"},
    "centre": lambda given: {"centre": "batch"},
    "epsilon": lambda given: {"norm_eps": 1e-5},
    "floor": lambda given: {"std_floor": 0.5},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_class_of_call_goes_through_tritons_launcher(
    change: Callable[[dict[str, Any]], dict[str, Any]], gpu: Driver, launched: mock.Mock
) -> None:
    given = arguments()
    call(given)
    call(given | change(given))
    assert launched.call_count == 2


REFUSED: dict[str, dict[str, Any]] = {
    "bias": {"bias": torch.zeros(2 * K + 1)}, "rows": {"rows": torch.zeros(N, dtype=torch.int32)},
    "weight": {"weight": torch.zeros(2 * K, D + 1)}, "norm_eps": {"norm_eps": True},
    "seed": {"seed": torch.zeros(2, dtype=torch.int64)}, "shift": {"shift": [0.0] * K},
    "aggregation": {"aggregation": "none"}, "std_floor": {"std_floor": [1e-3]},
    "scale": {"scale": torch.ones(K).to_sparse()},
}  # fmt: skip


@pytest.mark.parametrize("argument", REFUSED)
def test_a_wrong_argument_is_refused_after_a_right_one_too(argument: str, gpu: Driver) -> None:
    call(arguments(norm_eps=1.0))
    with pytest.raises(ValueError, match=f"{argument}: expected" if argument != "aggregation" else "aggregation"):
        call(arguments(norm_eps=1.0) | REFUSED[argument])
    assert len(gpu.starts) == 1


def test_one_tensor_in_two_places_is_not_taken_for_two(gpu: Driver, launched: mock.Mock) -> None:
    both, shift, scale = torch.ones(K), torch.zeros(K), torch.ones(K)
    call(arguments(shift=both, scale=both))
    call(arguments(shift=shift, scale=scale))
    assert launched.call_count == 1
    assert gpu.starts[1].arguments["shift"] == shift.data_ptr()
    assert gpu.starts[1].arguments["scale"] == scale.data_ptr()


def test_an_argument_that_must_be_copied_is_copied_in_every_call(gpu: Driver, launched: mock.Mock) -> None:
    for _ in range(2):
        call(arguments(bias=torch.zeros(2 * K, 2)[:, 0]))
    assert launched.call_count == 2


def test_a_sort_of_labels_is_made_in_every_call(gpu: Driver, launched: mock.Mock) -> None:
    """Many labels are centred by a second launch, after torch has sorted them."""
    labels = torch.zeros(configs.MAX_LABELLED_ROWS + 1, dtype=torch.int64)
    for _ in range(2):
        call(arguments(rows=torch.zeros_like(labels), group=labels, centre="group"))
    assert [call.args[0].__name__ for call in launched.mock_calls] == 2 * ["forward_kernel", "centre_kernel"]


def test_each_stream_and_each_captured_graph_counts_in_its_own_counters(gpu: Driver, launched: mock.Mock) -> None:
    given = arguments()
    for stream, capturing in ((0, False), (5, False), (5, True), (5, True), (5, False), (0, False)):
        gpu.stream, gpu.capturing = stream, capturing
        call(given)
    assert launched.call_count == 1
    assert [start.stream for start in gpu.starts] == [0, 5, 5, 5, 5, 0]
    first, second, third, fourth, *others = (start.arguments["counters"] for start in gpu.starts)
    assert len({first, second, third, fourth}) == 4
    assert others == [second, first]


def test_a_device_that_is_not_current_is_left_to_tritons_launcher(gpu: Driver) -> None:
    call(arguments())
    (kept,) = execution._replays._known.values()
    assert kept.direct.usable(torch.device("cuda", 0))
    assert not kept.direct.usable(torch.device("cuda", 1))
    gpu.device = 1
    assert kept.direct.usable(torch.device("cuda", 1))


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_launch_hook_is_called_for_every_launch(name: str, gpu: Driver, launched: mock.Mock) -> None:
    given, seen = arguments(), mock.Mock()
    call(given)
    with mock.patch.object(triton.knobs.runtime, name, seen):
        call(given)
        call(given)
    call(given)
    assert seen.call_count == 2
    assert launched.call_count == 3


def test_a_pre_run_hook_of_the_kernel_too(gpu: Driver, launched: mock.Mock) -> None:
    given, seen = arguments(), mock.Mock()
    call(given)
    with mock.patch.object(forward_kernel, "pre_run_hooks", [seen]):
        call(given)
    assert seen.call_count == 1
    assert launched.call_count == 2


def test_tritons_debug_setting_compiles_another_kernel(gpu: Driver, launched: mock.Mock) -> None:
    given = arguments()
    call(given)
    with mock.patch.object(triton.knobs.runtime, "debug", True):
        call(given)
        call(given)
    assert [start.compilation for start in gpu.starts] == [0, 1, 1]
    assert launched.call_count == 2


@pytest.mark.parametrize("name", ["PRUDENT_DEBUG", "PRUDENT_AUTOTUNE"])
def test_no_call_is_repeated_where_each_is_checked_or_tuned(
    name: str, gpu: Driver, launched: mock.Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments()
    call(given)
    monkeypatch.setenv(name, "1")
    call(given)
    assert launched.call_count == 2
    if name == "PRUDENT_DEBUG":
        with pytest.raises(ValueError, match="rows: expected values"):
            call(given | {"rows": torch.full((N,), STORED)})


def test_an_unknown_triton_launches_every_call(
    gpu: Driver, launched: mock.Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments()
    for version in ("3.3.1", "3.10.0", "4.0.0"):
        monkeypatch.setattr(triton, "__version__", version)
        call(given)
    assert launched.call_count == len(gpu.starts) == 3
    monkeypatch.setattr(triton, "__version__", "3.9.0+git")
    assert direct.Direct.of(forward_kernel, object()) is None  # a compiled kernel of another shape


def test_rocm_launches_every_call(gpu: Driver, launched: mock.Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, a tensor's storage decides too which kernel Triton takes."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for _ in range(2):
        call(arguments())
    assert launched.call_count == 2


def test_no_more_classes_are_kept_than_the_limit(gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "CLASSES", 3)
    for n in range(1, 9):
        call(arguments(rows=torch.zeros(n, dtype=torch.int64)))
        assert len(execution._replays._known) <= 3
