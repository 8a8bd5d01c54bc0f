"""The page in a real browser: drawn, silent, self-contained, on a phone, in the dark, on paper."""

from __future__ import annotations

from pathlib import Path

import chromium
import pytest
from sample import HOSTILE, sample_record

from residency.report import render_html

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium.find() is None, reason="no Chromium (and bash) on this machine"),
]
NOISE = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = chromium.Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    record = sample_record()
    record["comparisons"][0]["fixed"] += ["q000", "q001"]
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_html(record), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser, page):
    browser.view(1280)
    browser.open(page)
    return browser


def quiet(browser: chromium.Browser) -> None:
    """Nothing was logged, nothing failed, and only the page itself was asked for."""
    assert browser.evaluate("window.__errors") == []
    assert [event["params"] for event in browser.events if event["method"] in NOISE] == []
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def test_every_chart_is_drawn_in_silence(opened):
    boxes = opened.evaluate("document.querySelectorAll('.chart').length")
    assert boxes == 6
    marks = "'.trace .points path, .trace .lines path, .heatmaplayer image'"
    drawn = f"[...document.querySelectorAll('.chart')].filter((c) => c.querySelector({marks})).length"
    assert opened.evaluate(drawn) == boxes
    assert opened.evaluate("document.documentElement.dataset.charts") == str(boxes)
    assert opened.evaluate("document.querySelectorAll('.chart .points path.point').length") >= 812
    assert opened.evaluate("typeof window.__pwned") == "undefined"
    quiet(opened)


def test_the_policy_is_alive(opened):
    """A script the page did not bring does not run, and the page notices."""
    opened.evaluate(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.__foreign = 1';"
        " document.body.append(s); const i = new Image(); i.src = 'https://example.org/x.png'; })()"
    )
    opened.evaluate("new Promise((resolve) => setTimeout(resolve, 200))")
    assert opened.evaluate("typeof window.__foreign") == "undefined"
    assert {text.split()[1] for text in opened.evaluate("window.__errors")} == {"script-src-elem", "img-src"}


def test_hover_shows_hostile_text_as_text(opened):
    shown = opened.evaluate(
        "(() => { const map = [...document.querySelectorAll('.chart')].find((c) => c.data.some((t) => t.hovertext"
        " && t.hovertext[0].includes('bold'))); Plotly.Fx.hover(map, [{curveNumber: 0, pointNumber: 0}]);"
        " const layer = map.querySelector('.hoverlayer');"
        " return [layer.textContent, layer.querySelectorAll('a').length]; })()"
    )
    assert HOSTILE.split()[0] in shown[0]
    assert "<b>bold</b>" in shown[0]
    assert shown[1] == 0


@pytest.mark.parametrize("dark", [False, True])
def test_phone(browser, page, dark):
    browser.view(375, 800, dark=dark, phone=True)
    browser.open(page)
    browser.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 375
    assert browser.evaluate("document.querySelector('.scroll').scrollWidth") > 375  # in its own box
    quiet(browser)


@pytest.mark.parametrize("dark", [False, True])
def test_theme_reaches_page_and_charts(browser, page, dark):
    browser.view(1280, dark=dark)
    browser.open(page)
    line = "document.querySelector('#tradeoff .gridlayer path').style.stroke"
    ground = "getComputedStyle(document.body).backgroundColor"
    colours = {False: ("rgb(251, 250, 247)", "rgb(228, 224, 216)"), True: ("rgb(20, 23, 26)", "rgb(44, 50, 56)")}
    assert (browser.evaluate(ground), browser.evaluate(line)) == colours[dark]
    turn = "document.getElementById('theme').click()"
    for _ in range(1 if dark else 2):  # auto, light, dark
        browser.evaluate(turn)
    assert (browser.evaluate(ground), browser.evaluate(line)) == colours[not dark]
    browser.evaluate("localStorage.clear()")
    quiet(browser)


def test_cost_axis_is_chosen_by_keyboard(opened):
    title = "document.querySelector('#tradeoff .xtitle').textContent"
    assert opened.evaluate(title) == "tokens per second"
    opened.evaluate("document.querySelectorAll('[data-chart=tradeoff]')[1].focus()")
    for kind in ("keyDown", "char", "keyUp"):
        opened.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r", windowsVirtualKeyCode=13)
    assert opened.evaluate(title) == "bytes on disk (MB)"
    pressed = "[...document.querySelectorAll('[data-chart=tradeoff]')].map((b) => b.getAttribute('aria-pressed'))"
    assert opened.evaluate(pressed) == ["false", "true", "false", "false"]
    quiet(opened)


def test_filter_searches_rows_that_are_not_shown(opened):
    def ask(words: str) -> tuple[int, str]:
        return tuple(
            opened.evaluate(
                "(() => { const input = document.querySelector('input[data-filter]');"
                f" input.value = {words!r}; input.dispatchEvent(new Event('input'));"
                " const figure = input.closest('figure');"
                " return [figure.querySelectorAll('tbody tr').length,"
                " figure.querySelector('[role=status]').textContent]; })()"
            )
        )

    wanted = [
        row for row in sample_record()["steps"][0]["figures"][1]["rows"] if "near" in row[1] and "solar" in row[3]
    ]
    assert any(row[0] > 200 for row in wanted)
    assert ask("Near-DUP solar") == (len(wanted), f"{len(wanted)} of 812 rows match")
    assert ask("window.__pwned") == (1, "1 of 812 rows match")
    assert ask("") == (200, "812 rows; the first 200 are shown")
    assert opened.evaluate("document.querySelectorAll('td script, td img').length") == 0
    quiet(opened)


def test_print_is_light_and_unfolded(opened):
    assert opened.pdf().startswith(b"%PDF")
    opened.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert opened.evaluate("document.querySelectorAll('details:not([open])').length") == 0
    assert opened.evaluate("document.documentElement.dataset.theme") == "light"
    opened.evaluate("dispatchEvent(new Event('afterprint'))")
    assert opened.evaluate("document.querySelectorAll('details[open]').length") == 0
    quiet(opened)


@pytest.mark.parametrize(
    "record", [{}, {"name": "x", "status": "failed", "error": "gone", "exams": [{"id": "00-base"}]}]
)
def test_a_page_with_nothing_to_draw(browser, tmp_path, record):
    path = tmp_path / "report.html"
    path.write_text(render_html(record), encoding="utf-8")
    browser.view(375, 800)
    browser.open(path)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 375
    quiet(browser)
