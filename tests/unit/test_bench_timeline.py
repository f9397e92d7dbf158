"""What a Prometheus page says of a server, and what a run shows of itself as it goes."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from rich.console import Console

from baton.testing import in_virtual_time
from bench.generator import timeline as timeline_module
from bench.generator.progress import Figures, Progress, line_of, milliseconds, table_of
from bench.generator.sender import RunState
from bench.generator.timeline import Timeline, gauges
from bench.results.records import NOT_SENT, Outcome, RequestRecord, TimelineSample
from bench.results.slo import PRESETS

VLLM_PAGE = """
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m, with } a brace"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 7.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.25
vllm:num_requests_running_total{engine="0"} 99.0
process_cpu_seconds_total 12.0
"""


def test_vllms_gauges_are_summed_over_its_engines_and_kv_is_their_mean() -> None:
    assert gauges(VLLM_PAGE) == {"running": 5.0, "waiting": 7.0, "kv": 0.375}


def test_sglangs_gauges_have_other_names() -> None:
    page = 'sglang:num_running_reqs{a="b"} 4\nsglang:num_queue_reqs 1e1\nsglang:token_usage{a="b"} 0.125\n'
    assert gauges(page) == {"running": 4.0, "waiting": 10.0, "kv": 0.125}


def test_another_servers_page_says_nothing() -> None:
    assert gauges("<html>not found</html>\nprocess_cpu_seconds_total 12.0\nvllm:num_requests_running broken\n") == {}


def record(index: int, *, ttft_s: float = 0.2, gap_s: float = 0.02, outcome: Outcome = Outcome.OK) -> RequestRecord:
    begins = [index + ttft_s + place * gap_s for place in range(5)] if outcome is Outcome.OK else []
    return RequestRecord(
        index=index,
        group="all",
        session_id="",
        prompt_token_count=1,
        output_token_limit=5,
        intended_at_s=float(index),
        sent_at_s=index + 0.001,
        message_at_s=begins,
        message_token_counts=[1] * len(begins),
        ended_at_s=index + 1.0,
        outcome=outcome,
        error=None if outcome is Outcome.OK else "why",
    )


def figures_of(*records: RequestRecord, in_flight: tuple[RequestRecord, ...] = (), now: float = 10.0) -> Figures:
    state = RunState(0.0, 20, 60.0)
    state.ended += records
    state.in_flight |= {each.index: each for each in in_flight}
    figures = Figures(state, PRESETS["chatbot"], lambda: now)
    figures.refresh()
    return figures


def test_progress_counts_everything_that_was_sent() -> None:
    slow = record(2, ttft_s=0.9)
    figures = figures_of(record(0), record(1), slow, record(3, outcome=Outcome.REFUSED), in_flight=(record(4),))
    assert (figures.sent_count, figures.in_flight_count, figures.ended_count) == (5, 1, 4)
    assert figures.outcomes == {Outcome.OK: 3, Outcome.REFUSED: 1}
    assert figures.goodput_share == pytest.approx(2 / 4), "the slow one and the refused one are not good"
    assert figures.tokens_per_s == pytest.approx(20 / 10), "those in flight included"
    assert figures.requests_per_s == pytest.approx(0.5)
    assert figures.ttft_s(0.5) == pytest.approx(0.2)
    assert figures.itl_s(1.0) == pytest.approx(0.02)
    assert figures.lag_s(0.99) == pytest.approx(0.001)


def test_progress_looks_at_every_record_once() -> None:
    figures = figures_of(record(0))
    figures.state.ended.append(record(1))
    for _ in range(3):
        figures.refresh()
    assert figures.ended_count == 2
    assert figures.good_count == 2


def test_turns_that_were_not_sent_are_in_no_percentile() -> None:
    unsent = record(1, outcome=Outcome.ERROR)
    unsent.error = NOT_SENT
    unsent.sent_at_s = unsent.intended_at_s
    figures = figures_of(record(0), unsent)
    assert figures.lag_s(0.0) == pytest.approx(0.001)
    assert figures.goodput_share == pytest.approx(0.5)


def test_a_run_that_has_just_begun_shows_dashes() -> None:
    line = line_of(figures_of(now=0.0))
    assert "sent 0/20, in flight 0, ended none yet; 0 tokens/s, TTFT p50 – p99 –" in line
    assert table_of(figures_of(now=0.0), "a run").row_count == 7


@pytest.mark.parametrize(
    ("value_s", "text"),
    [(None, "–"), (0.0012, "1.20 ms"), (0.0512, "51 ms"), (2.5, "2500 ms"), (12.34, "12.3 s")],
)
def test_times_read_well(value_s: float | None, text: str) -> None:
    assert milliseconds(value_s) == text


@in_virtual_time
async def test_without_a_terminal_it_prints_a_line_every_few_seconds() -> None:
    stream = io.StringIO()
    progress = Progress(PRESETS["chatbot"], title="a run", stream=stream)
    state = RunState(asyncio.get_running_loop().time(), 20, 60.0)
    progress.observe(state)
    await asyncio.sleep(5.5)
    state.ended.append(record(0))
    await asyncio.sleep(5.0)
    await progress.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("5/60 s: sent 0/20")
    assert lines[1].startswith("10/60 s: sent 1/20")
    assert "1 tokens/s" in lines[1]


@in_virtual_time
async def test_quiet_prints_nothing() -> None:
    stream = io.StringIO()
    progress = Progress(None, title="a run", is_quiet=True, stream=stream)
    progress.observe(RunState(0.0, 20, 60.0))
    await asyncio.sleep(60)
    await progress.close()
    assert stream.getvalue() == ""


@asynccontextmanager
async def page_in_pieces(*pages: tuple[str, ...]) -> AsyncIterator[tuple[str, asyncio.Event]]:
    """The address of a page that changes with every look, each written piece by piece; set after the last."""
    looks = 0
    all_seen = asyncio.Event()

    async def answer(http: web.Request) -> web.StreamResponse:
        nonlocal looks
        pieces = pages[min(looks, len(pages) - 1)]
        looks += 1
        if looks > len(pages):
            all_seen.set()
        response = web.StreamResponse()
        await response.prepare(http)
        for piece in pieces:
            await response.write(piece.encode())
            await asyncio.sleep(0.02)  # so that the pieces arrive one by one
        return response

    app = web.Application()
    app.router.add_get("/metrics", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/metrics", all_seen
    finally:
        await runner.cleanup()


async def samples_of(*pages: tuple[str, ...]) -> tuple[list[TimelineSample], str]:
    samples: list[TimelineSample] = []
    async with page_in_pieces(*pages) as (url, all_seen):
        timeline = Timeline(metrics_url=url, interval_s=0.01, on_sample=samples.append)
        timeline.start(asyncio.get_running_loop().time())
        watching = timeline._task
        assert watching is not None
        async with asyncio.timeout(60):
            seen = asyncio.create_task(all_seen.wait())
            await asyncio.wait([seen, watching], return_when=asyncio.FIRST_COMPLETED)
            seen.cancel()
        await timeline.close()
    return samples, timeline.said


async def test_a_page_that_arrives_in_pieces_is_read_to_its_end() -> None:
    lines = VLLM_PAGE.splitlines(keepends=True)
    samples, _ = await samples_of(("".join(lines[:4]), "".join(lines[4:])))
    assert samples
    assert (samples[0].running_count, samples[0].waiting_count, samples[0].kv_used_share) == (5.0, 7.0, 0.375)


async def test_a_page_without_one_of_the_gauges_gives_no_sample() -> None:
    samples, _ = await samples_of(("vllm:num_requests_running 3\nvllm:num_requests_waiting 0\n",), (VLLM_PAGE,))
    assert samples
    assert {sample.kv_used_share for sample in samples} == {0.375}


async def test_a_server_that_never_tells_its_memory_is_said_to_give_no_sample() -> None:
    samples, said = await samples_of(("vllm:num_requests_running 3\nvllm:num_requests_waiting 0\n",))
    assert samples == []
    assert said.startswith("off: no sample came from metrics of http://127.0.0.1:")


async def test_a_page_without_end_ends_the_timeline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline_module, "MAX_PAGE_BYTES", 100)
    samples, said = await samples_of((VLLM_PAGE,))
    assert samples == []
    assert said.endswith("a page of more than 100 bytes")


def test_a_label_is_no_markup_in_the_progress() -> None:
    console = Console(file=io.StringIO(), width=120)
    with console.capture() as shown:
        console.print(table_of(figures_of(), "[red]peer[/] [/x]: chat"))
    assert "[red]peer[/] [/x]: chat" in shown.get()
