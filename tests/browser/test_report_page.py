"""A saved report, opened as a file in a real browser: its plots are there, and nothing else happened."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import BrowserFailed, Chromium
from sample_runs import HOSTILE, sample_run, sample_sweep

from bench.commands.report import main
from bench.results.report import render
from bench.results.report_page import json_block
from bench.results.run_data import RunData
from bench.results.store import write_run
from deploy.setup import prepare_browser
from deploy.setup.prepare_model import baton_home

PLOTS = """[...document.querySelectorAll(".js-plotly-plot")].map(plot => {
    const box = plot.getBoundingClientRect();
    const kinds = ".scatterlayer .trace path, .scatterlayer .point, .barlayer .point path";
    const marks = [...plot.querySelectorAll(kinds)].map(mark => mark.getBoundingClientRect());
    return {
        id: plot.id, width: box.width, height: box.height, traces: plot.data.length,
        title: plot.closest("figure").querySelector("h4").textContent,
        drawn: marks.filter(mark => mark.width > 0 || mark.height > 0).length,
        texts: [...plot.querySelectorAll("text")].map(text => text.textContent),
        lines: plot.querySelectorAll(".shapelayer path").length,
    };
})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    folder = prepare_browser.folder_of(baton_home())
    fault = prepare_browser.fault_of(folder)
    if fault is not None:
        pytest.fail(f"the browser is not ready at {folder}: {fault}. Run `make browser` (70 MB, ten seconds)")
    home = tmp_path_factory.mktemp("browser")
    with Chromium(folder / prepare_browser.PROGRAM, prepare_browser.environment_of(folder), home) as one:
        yield one


@pytest.fixture(scope="module")
def sweep_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two systems over four rates, saved as runs, read back and rendered by the command."""
    folder = tmp_path_factory.mktemp("sweep")
    for place, run in enumerate(sample_sweep()):
        write_run(folder / "runs" / f"run-{place}", run)
    page = folder / "report.html"
    assert main([str(folder / "runs"), "--out", str(page)]) == 0
    return page


def show(browser: Chromium, page: Path) -> None:
    """Opens a page and waits until it says that it drew what is shown."""
    browser.open(page.as_uri())
    wait_until(browser, 'document.documentElement.dataset.plots === "drawn"')


def wait_until(browser: Chromium, condition: str) -> None:
    deadline = time.monotonic() + 60
    while browser.evaluate(condition) is not True:
        assert time.monotonic() < deadline, f"never came true: {condition}; errors: {browser.console_errors()}"
        time.sleep(0.02)  # a poll of another process


def assert_nothing_else_happened(browser: Chromium, page: Path) -> None:
    assert browser.console_errors() == []
    elsewhere = [url for url in browser.requested_urls() if not url.startswith("data:")]
    assert elsewhere == [page.as_uri()], "the page asked for something besides itself"
    assert browser.evaluate("document.title") != "owned"


def test_a_saved_report_shows_its_plots_without_a_script_error_or_a_request(
    browser: Chromium, sweep_page: Path, tmp_path: Path
) -> None:
    browser.resize(1400, 1000)
    show(browser, sweep_page)
    plots: list[dict[str, Any]] = browser.evaluate(PLOTS)
    shown = browser.evaluate('document.querySelectorAll(".panel:not([hidden]) .plot").length')
    titles = [plot["title"] for plot in plots]
    assert len(plots) == shown
    for title in (
        *("TTFT against rate", "Goodput against rate", "Share within the SLO against rate", "Pareto front"),
        *("TTFT", "ITL", "TPOT", "E2E", "Longest gap of an answer"),
        *("Timeline", "Where the time went: mean", "Schedule lag", "Outcomes", "Demand of prefill and decode"),
    ):
        assert titles.count(title) == 1, f"{title} is not among {titles}"
    for plot in plots:
        assert plot["width"] > 300, plot["title"]
        assert plot["height"] > 100, plot["title"]
        assert plot["drawn"] >= plot["traces"] > 0, plot["title"]
    assert_nothing_else_happened(browser, sweep_page)
    browser.screenshot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 50_000


def test_latency_and_goodput_against_rate_have_their_slo_line(browser: Chromium, sweep_page: Path) -> None:
    show(browser, sweep_page)
    plots = {plot["title"]: plot for plot in browser.evaluate(PLOTS)}
    for title, words in (
        ("TTFT against rate", "SLO chatbot: TTFT"),
        ("TPOT against rate", "SLO chatbot: TPOT"),
        ("Longest gap of an answer against rate", "SLO chatbot: gap"),
        ("Share within the SLO against rate", "SLO chatbot: 90% of requests"),
    ):
        assert plots[title]["lines"] == 1, title
        assert words in plots[title]["texts"], title


def test_choosing_another_slo_and_another_run_shows_other_plots(browser: Chromium, sweep_page: Path) -> None:
    show(browser, sweep_page)
    for words in ("SLO voice", "8 requests/s", "5."):
        browser.evaluate(
            f"""(() => {{
                const options = [...document.querySelectorAll("option")];
                const option = options.find(one => one.textContent.startsWith({words!r}));
                option.parentElement.value = option.value;
                option.parentElement.dispatchEvent(new Event("change"));
            }})()"""
        )
    wait_until(browser, '[...document.querySelectorAll(".panel:not([hidden]) .plot")].every(p => p.data)')
    texts = [text for plot in browser.evaluate(PLOTS) for text in plot["texts"]]
    assert "SLO voice: TTFT" in texts
    # The second system's server said nothing of phases: its panel says so in the place of a plot.
    assert "did not say where the time" in browser.evaluate('document.querySelector("main").innerText')
    assert_nothing_else_happened(browser, sweep_page)


LINE_MISS_PX = """(() => {
    const button = document.querySelector("button[data-plot]");
    const plot = document.getElementById(button.dataset.plot);
    const axis = plot._fullLayout.yaxis;
    const line = plot.querySelector(".shapelayer path").getBoundingClientRect();
    const top = plot.querySelector(".main-svg").getBoundingClientRect().top;
    return Math.abs((line.top + line.bottom) / 2 - top - axis._offset - axis.d2p(plot.layout.shapes[0].y0));
})()"""
"""How far the SLO line of the first plot is from where its value is on the axis."""


def test_a_button_turns_an_axis_linear_and_back_and_the_slo_line_stays_at_its_value(
    browser: Chromium, sweep_page: Path
) -> None:
    show(browser, sweep_page)
    button = 'document.querySelector("button[data-plot]")'
    for kind in ("linear", "log"):
        browser.evaluate(f"{button}.click()")
        pressed = "true" if kind == "log" else "false"
        wait_until(browser, f"{button}.getAttribute('aria-pressed') === '{pressed}'")
        assert browser.evaluate(f"document.getElementById({button}.dataset.plot)._fullLayout.yaxis.type") == kind
        assert browser.evaluate(LINE_MISS_PX) < 2.0
    assert_nothing_else_happened(browser, sweep_page)


def test_a_hostile_label_is_shown_and_neither_runs_nor_fetches(browser: Chromium, sweep_page: Path) -> None:
    show(browser, sweep_page)
    assert HOSTILE in browser.evaluate('document.querySelector("table").innerText')
    assert browser.evaluate('document.querySelectorAll("main img, main script, main a").length') == 0
    assert_nothing_else_happened(browser, sweep_page)


def test_the_page_forbids_its_own_content_to_run_or_fetch_even_if_escaping_failed(
    browser: Chromium, tmp_path: Path
) -> None:
    page = tmp_path / "tampered.html"
    whole = render([sample_run("a", 3.0, duration_s=20.0)])
    page.write_text(whole.replace("<main>", f"<main>{HOSTILE}", 1), encoding="utf-8")
    show(browser, page)
    assert browser.evaluate("document.title") != "owned"
    assert "Content Security Policy" in " ".join(browser.console_errors())
    answered = [event for event in browser.events if event["method"] == "Network.responseReceived"]
    assert [event["params"]["response"]["url"] for event in answered] == [page.as_uri()]


def test_a_script_error_in_a_report_would_be_seen(browser: Chromium, tmp_path: Path) -> None:
    page = tmp_path / "broken.html"
    whole = render([sample_run("a", 3.0, duration_s=20.0)])
    broken = whole.replace('id="plots">{', 'id="plots">{' + json_block({"plot-1": {"data": 7}})[1:-1] + ",", 1)
    page.write_text(broken.replace('"plot-1":{"data":[', '"plot-x":{"data":['), encoding="utf-8")
    browser.open(page.as_uri())
    wait_until(browser, "document.readyState === 'complete'")
    assert browser.console_errors() != []


@pytest.mark.parametrize(("width_px", "is_dark"), [(390, False), (390, True), (1400, True)])
def test_a_report_fits_a_phone_and_a_dark_desktop(
    browser: Chromium, tmp_path: Path, width_px: int, is_dark: bool
) -> None:
    page = tmp_path / "one.html"
    page.write_text(render([sample_run("baton", 3.0, valid=False)]), encoding="utf-8")
    browser.resize(width_px, 900, is_phone=width_px < 500)
    browser.prefer_dark(is_dark)
    show(browser, page)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width_px
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background != "rgb(255, 255, 255)") == is_dark
    assert all(plot["drawn"] >= plot["traces"] for plot in browser.evaluate(PLOTS))
    assert_nothing_else_happened(browser, page)


def test_a_report_of_a_run_without_any_request_opens(browser: Chromium, tmp_path: Path) -> None:
    page = tmp_path / "empty.html"
    page.write_text(render([RunData({}, [])]), encoding="utf-8")
    show(browser, page)
    assert "No request was sent." in browser.evaluate("document.body.innerText")
    assert_nothing_else_happened(browser, page)


def test_a_browser_that_is_not_there_is_named_and_not_passed_over(tmp_path: Path) -> None:
    fault = prepare_browser.fault_of(prepare_browser.folder_of(tmp_path))
    assert fault == "it is not there"
    with pytest.raises((BrowserFailed, FileNotFoundError)), Chromium(tmp_path / "no-such", {}, tmp_path, timeout_s=5):
        pass  # pragma: no cover


def test_the_data_of_a_page_is_json_that_no_text_can_leave() -> None:
    block = json_block({"name": f"</script>{HOSTILE}\u2028"})
    assert "<" not in block
    assert json.loads(block)["name"].startswith("</script>")
