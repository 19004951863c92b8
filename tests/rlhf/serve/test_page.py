"""The page at `/` in a real Chromium: keyboard, both colour schemes, narrow screens, no foreign host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from prudent import Scorer

from .browser import Browser
from .conftest import Running

PROMPT, RESPONSES = "my day", ("good food", "bad hotel")
_SMALLEST_CONTRAST = """
(() => {
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
      .map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
      if (!c.endsWith(', 0)')) return c; } return 'rgb(255, 255, 255)'; };
  const contrast = e => { const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
      return (a + 0.05) / (b + 0.05); };
  return Math.min(...[...document.querySelectorAll('h1, p, label, textarea, button, th, td, #verdict')].map(contrast));
})()
"""


@pytest.fixture(scope="module")
def browser(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def compared(browser: Browser, running: Running) -> Browser:
    """The page after a comparison that was asked for by the keyboard alone."""
    browser.requests.clear()
    browser.errors.clear()
    browser.open(running.url)
    browser.wait_for("document.querySelectorAll('#model option').length === 1")
    for text in (PROMPT, *RESPONSES):
        browser.press("Tab", "Tab")
        browser.type(text)
    browser.press("Enter", "Enter", modifiers=2)
    browser.wait_for("!document.getElementById('result').hidden")
    return browser


def _table(browser: Browser, name: str) -> list[list[str]]:
    script = f"[...document.querySelectorAll('#{name} tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    rows: list[list[str]] = browser.run(script)
    return rows


def test_it_shows_what_the_scorer_says(compared: Browser, scorer: Scorer) -> None:
    items = [{"prompt": PROMPT, "response": response} for response in RESPONSES]
    direct = scorer.score(items)
    rewards = {name: cells for name, *cells in _table(compared, "rewards")}
    assert direct.distance is not None
    for name in ("tradeoff:0.4", "min", "lcb:1", "head:2", "trust:1"):
        a, b = scorer.score(items, aggregation=name).reward
        assert a is not None
        assert b is not None
        assert [float(cell) for cell in rewards[name][:2]] == pytest.approx([a, b], abs=1e-4)
        assert rewards[name][2].split(" by ")[0] == ("A" if a > b else "B")
        assert float(rewards[name][2].split(" by ")[1]) == pytest.approx(abs(a - b), abs=2e-4)
    heads = {name: cells for name, *cells in _table(compared, "heads")}
    for k in range(3):
        for row in range(2):
            mean, std = heads[f"head {k}"][row].split(" ± ")
            assert float(mean) == pytest.approx(direct.mean[row, k].item(), abs=1e-4)
            assert float(std) == pytest.approx(direct.std[row, k].item(), abs=1e-4)
    assert [float(cell) for cell in heads["distance"][:2]] == pytest.approx(direct.distance.tolist(), abs=1e-4)
    winner = "A" if direct.reward[0] > direct.reward[1] else "B"  # type: ignore[operator]
    assert compared.run("document.getElementById('verdict').textContent").startswith(f"Response {winner} by ")


def test_it_asks_no_foreign_host_and_logs_no_error(compared: Browser, running: Running) -> None:
    foreign = [url for url in compared.requests if not url.startswith((running.url, "data:"))]
    assert foreign == []
    assert [error for error in compared.errors if "favicon" not in error] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_is_readable_in_light_and_dark(compared: Browser, scheme: str) -> None:
    compared.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    assert compared.run("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    assert compared.run(_SMALLEST_CONTRAST) >= 4.5  # WCAG AA


@pytest.mark.parametrize("width", [320, 1280])
def test_it_fits_narrow_and_wide_screens(compared: Browser, width: int) -> None:
    screen: dict[str, Any] = {"width": width, "height": 700, "deviceScaleFactor": 1, "mobile": width < 600}
    compared.call("Emulation.setDeviceMetricsOverride", **screen)
    assert compared.run("document.documentElement.scrollWidth") <= width
    compared.call("Emulation.clearDeviceMetricsOverride")


def test_an_error_is_shown_and_the_old_result_is_not(compared: Browser) -> None:
    compared.run("document.getElementById('prompt').value = 'my '.repeat(70000)")
    compared.press("Enter", "Enter", modifiers=2)
    compared.wait_for("document.getElementById('error').textContent !== ''")
    assert "413: item 0: expected at most 200000 characters" in compared.run(
        "document.getElementById('error').textContent"
    )
    assert compared.run("document.getElementById('result').hidden")
