"""The table that `prudent train` prints last."""

from __future__ import annotations

from pathlib import Path

from prudent.rlhf.reward.outcome import _DROPPED, TrainResult


def _said(rows: dict[str, tuple[float, float]], prompts: int = 40) -> list[str]:
    """The table's lines for name -> (value, upper end of the difference to the first, the best)."""
    best, *others = rows
    metrics = {
        "train_pairs": 9,
        "held_out_pairs": 114,
        "held_out_prompts": prompts,
        "dropped": dict.fromkeys(_DROPPED, 0),
        "accuracy": {
            name: {"value": value, "low": value - 0.1, "high": value + 0.1} for name, (value, _) in rows.items()
        },
        "best": best,
        "minus_best": {name: {"value": -0.1, "low": -0.2, "high": rows[name][1]} for name in others},
    }
    return str(TrainResult(Path("run"), metrics)).splitlines()[2:-1]


def test_rows_that_the_pairs_cannot_tell_apart_are_named() -> None:
    few = _said({"worst": (0.588, 0.0), "nominal": (0.386, 0.01)})
    assert few[0].split() == ["held-out", "accuracy,", "%", "95", "%", "interval"]
    assert few[1].split() == ["worst", "58.8", "48.8", "to", "68.8"]
    assert few[-1] == "114 pairs of 40 prompts are too few to tell these rows apart"
    some = _said({"worst": (0.6, 0.0), "mean": (0.59, 0.02), "nominal": (0.3, -0.05)})
    assert some[-1] == "114 pairs of 40 prompts are too few to tell the best, worst, from mean"
    told = _said({"worst": (0.6, 0.0), "nominal": (0.3, -0.05)})
    assert not any("too few" in line for line in told)
    prompts = _said({"worst": (0.6, 0.0), "nominal": (0.3, -0.05)}, prompts=3)
    assert prompts[-2] == "114 pairs of 3 prompts are too few to tell these rows apart"
    assert prompts[-1].startswith("The intervals resample 3 prompts")
