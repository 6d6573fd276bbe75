"""The HTML report in Chromium: phone and desktop widths, dark mode and print."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Chromium, find_chromium
from report_helpers import large_set, whole_report

from eval.reports.files import write

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no chromium here (Debian's package chromium)")

# WCAG 2.1 contrast of all visible text with its background.
LEAST_CONTRAST = """(() => {
  const channel = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = c.match(/[0-9.]+/g).map(Number);
                       return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b); };
  const behind = e => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor; if (!c.endsWith(", 0)")) return c; } };
  let least = 21;
  for (const e of document.querySelectorAll("h1, h2, h3, p, td, th, summary, a, dt, dd, svg text")) {
    const style = getComputedStyle(e), text = e.matches("svg text") ? style.fill : style.color;
    const [a, b] = [light(text), light(behind(e))].sort((x, y) => y - x);
    least = Math.min(least, (a + 0.05) / (b + 0.05));
  }
  return least;
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    whole = whole_report()
    write(folder, dataclasses.replace(whole, sets=[*whole.sets, large_set()]))
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@pytest.mark.parametrize("width", [390, 1200])
def test_page_fits_loads_nothing_else_and_reports_no_error(browser: Chromium, page: Path, width: int) -> None:
    browser.open(page, width)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.said("Log.entryAdded") == [] and browser.said("Runtime.exceptionThrown") == []
    requested = [event["request"]["url"] for event in browser.said("Network.requestWillBeSent")]
    assert [url for url in requested if not url.startswith("data:")] == [page.resolve().as_uri()]
    # Elements that overflow are scrollable.
    outside = "[...document.querySelectorAll('td, th, svg, summary, dd')].filter(e => !e.closest('.wide') && "
    assert browser.evaluate(f"{outside}e.getBoundingClientRect().right > {width}).length") == 0


def test_all_images_load_and_all_plots_have_a_label(browser: Chromium, page: Path) -> None:
    browser.open(page, 1200)
    images = "[...document.querySelectorAll('img, image')].map(e => e.src || e.href.baseVal)"
    assert browser.evaluate(f"{images}.length") >= 1
    load = "s => new Promise((good, bad) => {const i = new Image(); i.onload = () => good(i.width); i.onerror = bad; "
    assert min(browser.evaluate(f"Promise.all({images}.map({load}i.src = s}})))")) > 100
    plots = browser.evaluate("[...document.querySelectorAll('svg')].map(e => [e.clientWidth, e.ariaLabel])")
    assert len(plots) >= 9 and all(width > 200 and label for width, label in plots)


def test_names_with_markup_are_shown_as_text(browser: Chromium, page: Path) -> None:
    browser.open(page, 1200)
    assert browser.evaluate("document.title") == "toy <title>"
    assert browser.evaluate("document.querySelectorAll('script, td b b, i').length") == 0
    assert browser.evaluate("document.querySelector('summary b').textContent").startswith("<script>alert(1)</script>")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_has_sufficient_contrast(browser: Chromium, page: Path, dark: bool) -> None:
    browser.open(page, 1200, dark=dark)
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") is not dark
    assert browser.evaluate(LEAST_CONTRAST) >= 4.5


def test_print_is_white_and_includes_collapsed_sections(browser: Chromium, page: Path, tmp_path: Path) -> None:
    shown = (
        "document.querySelector('details li').checkVisibility({contentVisibilityAuto: true, visibilityProperty: true})"
    )
    browser.open(page, 794, dark=True)
    assert not browser.evaluate(shown)
    browser.open(page, 794, dark=True, media="print")
    assert browser.evaluate(shown)
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.evaluate("document.documentElement.scrollWidth") <= 794
    browser.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().count(b"/Type /Page\n") >= 2
