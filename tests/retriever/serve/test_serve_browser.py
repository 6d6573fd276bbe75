"""The search page in headless Chromium."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import Chromium, find_chromium
from cli_helpers import command, write_lines
from serve_helpers import Server, serving

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="needs chromium (Debian: apt-get install chromium)")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

PASSAGES = {
    "eiffel": ("Eiffel Tower", "A wrought-iron lattice tower in Paris, 330 meters tall."),
    "amazon": ("Amazon", "A tropical rainforest that covers most of the Amazon basin."),
    "violin": ("", "The violin is a small string instrument played with a bow.\n\n" + "It is made of wood. " * 30),
    "markup": ("<script>document.title = 'run'</script>", "<img src=x onerror=\"document.title='run'\"> & more"),
}


class Page(Chromium):
    """The search page in a browser."""

    def visit(self, address: str) -> None:
        """Load an address and wait for it."""
        self.events.clear()
        self.call("Page.navigate", url=address)
        self._loaded()

    def ask(self, query: str) -> list[str]:
        """Replace the query, press Enter, and return the text of each result."""
        self.evaluate("document.getElementById('query').select()")
        self.events.clear()
        self.call("Input.insertText", text=query)
        enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
        self.call("Input.dispatchKeyEvent", type="keyDown", text="\r", **enter)
        self.call("Input.dispatchKeyEvent", type="keyUp", **enter)
        self._loaded()
        return self.texts("li")

    def texts(self, selector: str) -> list[str]:
        """The visible texts of the elements that match a selector."""
        elements = f"[...document.querySelectorAll({json.dumps(selector)})]"
        texts = self.evaluate(f"{elements}.map(element => element.innerText)")
        return [" ".join(text.split()) for text in texts]

    def style(self, selector: str, name: str) -> str:
        """A computed style of the first element that matches a selector."""
        return str(
            self.evaluate(f"getComputedStyle(document.querySelector({json.dumps(selector)}))[{json.dumps(name)}]")
        )

    def _loaded(self) -> None:
        deadline = time.monotonic() + 60
        while not self.said("Page.loadEventFired"):
            assert time.monotonic() < deadline, "the page did not load"
            time.sleep(0.05)
            # Events are received with the answer to any command.
            self.call("Page.getFrameTree")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with Page(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def address(minilm: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    rows: list[object] = [
        {"_id": name, "title": title, "text": text, "long": name == "violin", "tags": [name[:2], "any"]}
        for name, (title, text) in PASSAGES.items()
    ]
    corpus = write_lines(folder / "corpus.jsonl", rows)
    fields = ("--fields", "long", "tags")
    for arguments in (
        ("encode", "--model", minilm, "--data", corpus, "--out", folder / "embeddings", *fields),
        ("index", "build", "--embeddings", folder / "embeddings", "--out", folder / "index"),
    ):
        outcome = command(*arguments)
        assert outcome.code == 0, outcome.err
    server: Server
    with serving(minilm, folder / "index") as server:
        yield f"http://127.0.0.1:{server.port}/"


def logged_errors(browser: Page) -> list[Any]:
    """Entries of the browser's log, and resources that failed to load."""
    return browser.said("Log.entryAdded") + browser.said("Network.loadingFailed")


def test_a_typed_query_shows_the_best_passage_with_its_score(browser: Page, address: str, tmp_path: Path) -> None:
    browser.visit(address)
    assert browser.texts("main") == ["4 passages, found by meaning rather than by word."]
    first = browser.ask("how high is the monument of Paris?")[0]
    assert first.startswith("Eiffel Tower A wrought-iron")
    assert browser.evaluate("document.getElementById('query').value") == "how high is the monument of Paris?"
    scores = [float(score) for score in browser.texts(".score")]
    assert len(scores) == 4 and 0.3 < scores[0] < 1 and scores == sorted(scores, reverse=True)
    assert " of 4 passages in " in browser.texts("main .note")[0]
    assert "violin" in browser.ask("instrument with strings")[0]
    assert logged_errors(browser) == []
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_markup_in_queries_and_passages_is_shown_as_text(browser: Page, address: str) -> None:
    browser.visit(address)
    query = "\"><script>document.title='run'</script>"
    shown = browser.ask(query)
    assert any("onerror" in text for text in shown)
    assert browser.evaluate("document.title").startswith(query[:20])
    assert browser.evaluate("document.querySelectorAll('script, main img').length") == 0
    assert logged_errors(browser) == []


@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_fits_the_window_and_follows_dark_mode(browser: Page, address: str, width: int) -> None:
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=740, deviceScaleFactor=1, mobile=width < 500)
    backgrounds = []
    for scheme in ("light", "dark"):
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        browser.visit(f"{address}?q={'unbroken' * 40}")
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        backgrounds.append(browser.style("body", "backgroundColor"))
        # On a phone a header that stays would cover half of the screen.
        assert browser.style("header", "position") == ("static" if width < 500 else "sticky")
        # The content security policy allows the style sheet.
        assert browser.style("li", "borderTopLeftRadius") != "0px"
    assert len(set(backgrounds)) == 2


def test_keys_alone_filter_and_open_a_long_passage(browser: Page, address: str) -> None:
    browser.call("Emulation.setDeviceMetricsOverride", width=900, height=740, deviceScaleFactor=1, mobile=False)
    browser.visit(f"{address}?q=small+violin&filter=long%3Dtrue")
    assert browser.texts("main .values") == [f"{browser.texts('.score')[0]} violin long: true tags: vi, any"]
    assert browser.texts("mark") == ["violin", "small"]
    assert "model: " in browser.texts("footer")[0] and "index: Flat" in browser.texts("footer")[0]
    # Skip link, query, number, button, More, filter, and then the excerpt.
    for _ in range(7):
        press(browser, "Tab", 9)
    assert browser.evaluate("document.activeElement.className") == "text"
    assert not browser.evaluate("document.querySelector('li details').open")
    press(browser, "Enter", 13)
    assert browser.evaluate("document.querySelector('li details').open")
    assert browser.texts("li details")[0].endswith("It is made of wood.")
    assert logged_errors(browser) == []


def press(browser: Page, key: str, code: int) -> None:
    text = {"text": "\r"} if key == "Enter" else {}
    browser.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code, **text)
    browser.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)
