"""The README's snippets run as they stand, except those that need a model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parents[1] / "README.md"


def snippets() -> dict[str, str]:
    """The Python block under each heading."""
    return dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.*?)```", README.read_text(), re.DOTALL | re.M))


def test_the_ops_snippets_run_one_after_the_other() -> None:
    found, names = snippets(), dict[str, Any]()
    for heading in ("The op, from your own code", "The ops of a PPO step"):
        exec(found[heading], names)
    assert names["hidden"].grad.isfinite().all()
    assert names["lm_head"].grad.shape == (1000, 64)
    assert names["weight"].grad.shape == names["weight"].shape
    assert names["step"].loss.isfinite()
