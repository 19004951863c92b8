"""How a penalty was chosen, in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prudent.rlhf.report.fit import FIT_FILE, fit_rows, fit_sentence, read_fit


def _fit(**change: Any) -> dict[str, Any]:
    curve = [
        {"l2": 1e-3, "log_loss": 0.61, "standard_error": 0.02},
        {"l2": 3e-3, "log_loss": 0.58, "standard_error": 0.01},
    ]
    return {"l2": 3e-3, "folds": 5, "held_out": "prompt", "edge": None, "curve": curve, **change}


def test_the_choice_is_a_sentence() -> None:
    said = "single head: L2 0.003 has the least log-loss on held-out prompts, 0.5800 (standard error 0.0100, 5 folds)"
    assert fit_sentence(_fit()) == said
    assert fit_sentence(_fit(edge="high")).endswith("as if the pairs held nothing to learn")
    assert fit_sentence(_fit(edge="low")).endswith("up to the smallest penalty tried")
    assert "on held-out pairs" in fit_sentence(_fit(held_out="pair"))
    assert fit_sentence(_fit(held_out="pair")).endswith("the log-loss is too low")
    assert fit_sentence(_fit(curve=[])) == "single head: exact fit with L2 0.003"


def test_the_curve_is_a_table_with_a_mark_at_the_choice() -> None:
    assert fit_rows(_fit())[1:] == [["0.001", "0.6100", "0.0200", ""], ["0.003", "0.5800", "0.0100", "chosen"]]


def test_a_model_without_a_choice_has_none(tmp_path: Path) -> None:
    assert read_fit("some/hub-name") is None
    (tmp_path / FIT_FILE).write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        read_fit(str(tmp_path))
