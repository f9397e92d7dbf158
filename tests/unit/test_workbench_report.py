"""The pure parts of a report: what is thinned keeps its tail and peaks, and nothing a run says becomes markup."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re
from pathlib import Path

import plotly.graph_objects
import pytest
from sample_runs import HOSTILE, sample_run, sample_sweep

from bench.commands.report import find_runs, main
from bench.results import report_data
from bench.results.records import NOT_SENT, Outcome, RequestRecord
from bench.results.report import figure, percent, render
from bench.results.report_page import policy, pretty
from bench.results.report_plots import SYSTEM_COLOURS, Plot, Style, against_rate, pareto, schedule_lag, waterfall
from bench.results.report_view import RunView
from bench.results.run_data import RunData
from bench.results.store import write_run


class Elements(html.parser.HTMLParser):
    """What a browser would make elements of, and the text of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._script: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "script":
            self._script = ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "script" and self._script is not None:
            self.scripts.append(self._script)
            self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self._script += data
        else:
            self.text += data


@pytest.fixture(scope="module")
def sweep() -> list[RunData]:
    return sample_sweep()


@pytest.fixture(scope="module")
def page(sweep: list[RunData]) -> str:
    return render(sweep)


@pytest.fixture(scope="module")
def elements(page: str) -> Elements:
    return Elements(page)


def views_of(runs: list[RunData]) -> list[RunView]:
    return [RunView.of(place + 1, run, shows_workload=False) for place, run in enumerate(runs)]


def test_the_lag_plot_is_of_what_was_sent() -> None:
    run = sample_run("a", 2.0)
    for each in run.records[10:]:
        each.outcome, each.error, each.sent_at_s = Outcome.ERROR, NOT_SENT, each.intended_at_s
    for each in run.records[:10]:
        each.sent_at_s = each.intended_at_s + 0.25
    (view,) = views_of([run])
    plot = schedule_lag(view, Style([view.system]), point_limit=100)
    assert "p99 250 ms" in plot.caption
    assert set(plot.data[0]["x"]) == {250.0}


def record(index: int, at_s: float, *, prompt: int = 100, **phases_s: float) -> RequestRecord:
    return RequestRecord(
        index=index,
        group="all",
        session_id="",
        prompt_token_count=prompt,
        output_token_limit=2,
        intended_at_s=at_s,
        sent_at_s=at_s,
        message_at_s=[at_s + 0.1, at_s + 0.2],
        message_token_counts=[1, 1],
        ended_at_s=at_s + 0.2,
        outcome=Outcome.OK,
        phases_s=phases_s or None,
    )


# Thinning


def test_a_short_distribution_is_drawn_from_every_value() -> None:
    assert report_data.cdf([3.0, 1.0, 2.0, 2.0], total_count=4, point_limit=10) == (
        [1.0, 1.0, 2.0, 2.0, 3.0],
        [0.0, 0.25, 0.5, 0.75, 1.0],
    )


def test_requests_without_a_value_keep_a_distribution_below_one() -> None:
    _, shares = report_data.cdf([1.0, 2.0], total_count=4, point_limit=10)
    assert shares[-1] == 0.5


def test_a_thinned_distribution_has_only_values_at_their_own_ranks_and_keeps_the_tail() -> None:
    count = 100_000
    values = [float(i) for i in range(1, count + 1)]
    x, shares = report_data.cdf(values[::-1], total_count=count, point_limit=400)
    assert len(x) <= 401
    assert all(
        share == pytest.approx(value / count, rel=1e-4) for value, share in zip(x[1:], shares[1:], strict=True)
    )
    assert x[-1] == count
    # Besides the p99.9 there are others beyond it: a line through two points would be made up.
    assert sum(share > 0.999 for share in shares) > 20


def test_a_distribution_of_nothing_has_no_points() -> None:
    assert report_data.cdf([], total_count=5, point_limit=10) == ([], [])


def test_a_thinned_series_keeps_its_order_its_ends_and_every_peak() -> None:
    x = [float(i) for i in range(10_000)]
    y = [0.0] * 10_000
    y[1234], y[9000] = 7.0, -3.0
    at, kept = report_data.with_peaks(x, y, point_limit=100)
    assert len(at) <= 102
    assert at == sorted(at)
    assert (at[0], at[-1]) == (0.0, 9999.0)
    assert (max(kept), min(kept)) == (7.0, -3.0)
    assert at[kept.index(7.0)] == 1234.0


def test_arrivals_are_counted_in_round_bins_and_empty_ones_stay() -> None:
    records = [record(i, at_s) for i, at_s in enumerate((0.0, 0.5, 9.9))]
    assert report_data.arrivals(records, duration_s=10.0, bin_limit=10) == (
        1.0,
        [float(i) for i in range(11)],
        [2, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0],
    )


@pytest.mark.parametrize(("value", "expected"), [(0.0, 0.1), (0.3, 0.5), (1.0, 1.0), (1.1, 2.0), (51.0, 100.0)])
def test_bins_are_one_two_or_five_of_a_power_of_ten(value: float, expected: float) -> None:
    assert report_data.round_up(value) == expected


def test_the_pareto_front_is_what_no_other_point_beats_in_both() -> None:
    points = [(1.0, 9.0), (5.0, 5.0), (4.0, 4.0), (9.0, 1.0), (5.0, 6.0)]
    assert [points[i] for i in report_data.pareto_front(points)] == [(9.0, 1.0), (5.0, 6.0), (1.0, 9.0)]
    assert report_data.pareto_front([]) == []


def test_phases_are_averaged_by_length_of_the_prompt_and_absent_ones_count_as_none() -> None:
    records = [
        record(0, 0.0, prompt=100, queue=0.1, decode=1.0),
        record(1, 1.0, prompt=128, queue=0.3),
        record(2, 2.0, prompt=129, prefill=0.5),
        record(3, 3.0, prompt=9000),
    ]
    bars = report_data.phase_bars(records)
    assert [(bar.name, bar.request_count) for bar in bars] == [
        ("1 to 128 tokens", 2),
        ("129 to 512 tokens", 1),
        ("all", 3),
    ]
    assert bars[0].mean_ms == pytest.approx({"queue": 200.0, "prefill": 0.0, "decode": 500.0})
    assert list(bars[0].mean_ms) == ["queue", "prefill", "decode"]
    assert bars[2].mean_ms["queue"] == pytest.approx(400.0 / 3)


# Plots


def test_every_plot_has_only_attributes_that_plotly_knows(page: str) -> None:
    found = json.loads(re.search(r'id="plots">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    assert len(found) > 100
    for plot in found.values():
        plotly.graph_objects.Figure(plot)  # raises for an unknown attribute or a wrong value


def test_a_system_has_one_colour_on_all_plots_and_simulated_runs_hollow_markers(sweep: list[RunData]) -> None:
    views = views_of(sweep)
    style = Style.of(views)
    assert style.colour("baton 1P+1D") == SYSTEM_COLOURS[0] != style.colour(HOSTILE)
    plot = against_rate(
        views, style, title="", caption="", y_title="", curves={"p50": lambda view: view.latency_ms("ttft", "p50")}
    )
    baton, other, simulated = plot.data
    assert [trace["line"]["color"] for trace in plot.data] == [
        SYSTEM_COLOURS[0],
        SYSTEM_COLOURS[1],
        SYSTEM_COLOURS[0],
    ]
    assert baton["x"] == [1.0, 3.0, 5.0, 8.0]
    assert (simulated["line"]["dash"], simulated["marker"]["symbol"]) == ("dash", ["circle-open"])
    assert "(simulated)" in simulated["name"]
    # The run at 8/s of the second system is invalid, and looks it.
    assert other["marker"]["symbol"][-1] == "x-thin-open"


def test_repeated_runs_at_one_rate_are_joined_at_their_median() -> None:
    runs = [sample_run("a", 3.0, duration_s=20.0, seed=seed) for seed in (1, 2, 3)]
    views = views_of([*runs, sample_run("a", 5.0, duration_s=20.0)])
    plot = against_rate(
        views, Style.of(views), title="", caption="", y_title="", curves={"n": lambda view: float(view.number)}
    )
    line, marks = plot.data
    assert (line["mode"], line["x"], line["y"]) == ("lines", [3.0, 5.0], [2.0, 4.0])
    assert (marks["mode"], marks["y"]) == ("markers", [1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize(
    ("arrivals", "arrival_count", "offered_per_s", "name"),
    [
        ("requests", None, 0.5, "0.5 requests/s"),
        ("sessions of one or more turns", 60, 0.5, "0.5 requests/s"),
        ("sessions of several turns", 20, 2.0, "0.5 sessions/s"),
        ("sessions of several turns", None, 2.0, "0.5 sessions/s"),
        ("streams of chat; bursts come by their own parameters", 20, 2.0, "0.5 streams/s"),
        ("requests; some arrivals are bursts of several at one instant", 50, 2.0, "0.5 arrivals/s"),
    ],
)
def test_the_offered_rate_is_of_requests_and_a_pacers_rate_of_what_arrives(
    arrivals: str, arrival_count: int | None, offered_per_s: float, name: str
) -> None:
    # 40 due in 20 s, ten turns after the schedule, and ten that were never sent.
    records = [record(index, index / 2) for index in range(40)] + [record(40 + index, 30.0) for index in range(10)]
    records += [record(50 + index, 10.0) for index in range(10)]
    for unsent in records[50:]:
        unsent.outcome, unsent.error = Outcome.ERROR, NOT_SENT
    plan = {"workload": "w", "duration_s": 20.0, "rate_per_s": 0.5, "arrivals": arrivals, "request_count": 60}
    counted = {} if arrival_count is None else {"arrival_count": arrival_count}
    (view,) = views_of([RunData({"label": "a", "valid": True, "plan": plan | counted}, records)])
    assert (view.offered_per_s, view.rate_key, view.rate_name) == (offered_per_s, 0.5, name)
    assert view.name == f"a @ {name.replace(' requests', '')}"


def test_invalid_and_simulated_runs_are_not_on_the_pareto_front() -> None:
    views = views_of(
        [
            sample_run("a", 1.0, duration_s=20.0),
            sample_run("a", 4.0, duration_s=20.0),
            sample_run("b", 8.0, duration_s=20.0, valid=False),
            sample_run("c", 8.0, duration_s=20.0, kind="simulated"),
        ]
    )
    front = next(trace for trace in pareto(views, Style.of(views)).data if trace["name"] == "Pareto front")
    assert max(front["y"]) == pytest.approx(views[1].output_tokens_per_s, rel=1e-3)


def test_a_target_that_says_nothing_of_phases_gives_a_sentence_instead_of_an_empty_plot() -> None:
    (view,) = views_of([sample_run("a", 3.0, duration_s=20.0, has_phases=False)])
    plots: tuple[Plot, Plot] = waterfall(view)
    assert all(plot.empty and not plot.data for plot in plots)


# Page


def test_the_page_has_no_address_to_fetch_from_and_allows_only_its_own_two_scripts(
    page: str, elements: Elements
) -> None:
    stated = next(
        value for name, value in elements.attributes if name == "content" and "default-src" in (value or "")
    )
    assert stated is not None
    assert stated.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in stated.split("style-src")[0]
    allowed = set(re.findall(r"'sha256-([^']+)'", stated))
    data, *scripts = elements.scripts
    assert {base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in scripts} == allowed
    assert json.loads(data)
    assert not {"img", "link", "iframe", "object", "form", "base"} & set(elements.tags)
    links = [value for name, value in elements.attributes if name in ("href", "src")]
    assert all(value is not None and value.startswith("#section-") for value in links)
    assert policy(["x"]).count("sha256-") == 1


def test_a_hostile_label_is_text_wherever_it_stands(page: str, elements: Elements) -> None:
    assert HOSTILE in elements.text
    assert '<script>document.title="owned"' not in page
    assert not [name for name, _ in elements.attributes if name.startswith("on")]
    # Plotly reads tags and entities in every text of a plot: it gets them escaped once more.
    assert "&lt;script>" not in elements.scripts[0]
    names = {trace.get("name", "") for plot in json.loads(elements.scripts[0]).values() for trace in plot["data"]}
    assert any("&lt;script&gt;" in name for name in names)
    assert not any("<" in name for name in names)


def test_a_report_of_many_runs_stays_within_some_megabytes(page: str) -> None:
    library = max(len(script) for script in Elements(page).scripts)
    runs = [sample_run(f"system {i % 4}", 2.0 + i // 4, duration_s=10.0, seed=i) for i in range(24)]
    assert len(render(runs)) - library < 3_000_000


def test_an_invalid_run_says_so_in_red_with_its_reasons() -> None:
    whole = Elements(render([sample_run("a", 3.0, duration_s=20.0, valid=False)]))
    assert ("role", "alert") in whole.attributes
    assert "This run is invalid: do not quote it" in whole.text
    assert "steal 7% is over 2%" in whole.text


def test_a_valid_measured_run_has_no_alarm_and_a_simulated_one_is_marked() -> None:
    measured = Elements(render([sample_run("a", 3.0, duration_s=20.0)]))
    simulated = Elements(render([sample_run("a", 3.0, duration_s=20.0, kind="simulated")]))
    assert ("role", "alert") not in measured.attributes
    assert "SIMULATED" not in measured.text
    assert "SIMULATED" in simulated.text


def test_seeds_trace_hash_and_versions_stand_on_the_page(elements: Elements) -> None:
    for words in (
        "plan.seed",
        "plan.trace_sha256",
        "0" * 64,
        "versions.vllm",
        "machine.cpu",
        "worker_counts.prefill",
    ):
        assert words in elements.text, words


def test_no_runs_make_no_report() -> None:
    with pytest.raises(ValueError, match="at least one run"):
        render([])


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (float("nan"), "–"), (0.0, "0"), (12345.0, "12,345"), (1.234, "1.23"), (0.01234, "0.0123")],
)
def test_figures_have_three_digits_and_no_exponent(value: float | None, shown: str) -> None:
    assert figure(value) == shown


@pytest.mark.parametrize(("share", "shown"), [(1.0, "100.0%"), (0.99999, ">99.9%"), (0.0, "0.0%"), (1e-5, "<0.1%")])
def test_a_share_is_never_rounded_to_all_or_none(share: float, shown: str) -> None:
    assert percent(share) == shown


def test_json_that_is_cut_says_so() -> None:
    assert pretty({"a": 1}, character_limit=100) == '{\n  "a": 1\n}'
    assert "cut here" in pretty({"a": "x" * 1000}, character_limit=100)


# The command


def test_the_command_finds_runs_at_any_depth_once_and_in_order(tmp_path: Path) -> None:
    for name in ("sweep/b", "sweep/a", "other"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.json").write_text("{}")
    found = find_runs([tmp_path / "other", tmp_path / "sweep", tmp_path / "sweep" / "a"])
    assert [path.name for path in found] == ["other", "a", "b"]


def test_the_command_writes_the_page_beside_the_runs_or_where_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", sample_run("a", 3.0, duration_s=20.0))
    assert main([str(tmp_path / "run")]) == 0
    assert main([str(tmp_path), "--out", str(tmp_path / "page.html"), "--title", "<b>mine</b>"]) == 0
    assert (tmp_path / "run" / "report.html").stat().st_size > 4_000_000
    assert "<title>&lt;b&gt;mine&lt;/b&gt;</title>" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "page.html" in capsys.readouterr().out


def test_the_command_says_which_directory_has_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "has no run" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "is not a directory" in capsys.readouterr().err
