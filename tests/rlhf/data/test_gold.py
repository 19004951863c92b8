"""The gold scorer, and the error if its package is missing."""

from __future__ import annotations

import sys

import pytest

from prudent.rlhf.data.gold import VaderGold


def test_vader_ranks_praise_above_nothing_above_blame() -> None:
    pytest.importorskip("vaderSentiment", reason="an extra: pip install 'prudent[demo]'")
    gold = VaderGold()
    praise, nothing, blame = gold(["The food was wonderful.", "The train is here.", "What a horrible, rude waiter."])
    assert 1 >= praise > nothing == 0 > blame >= -1
    assert gold(["Lovely."]) == gold(["Lovely."])
    assert gold([]) == []


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ImportError, match=r"pip install 'prudent\[demo\]'"):
        VaderGold()
