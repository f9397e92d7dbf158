"""``baton bench run`` beside the traffic: what is refused before anything is sent, what a sweep leaves and shows."""

from __future__ import annotations

import asyncio
import io
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from workbench_records import record

from baton.__main__ import main
from bench.commands import run as command
from bench.commands.compare import table
from bench.commands.target_options import Reached
from bench.generator.run_table import run_table
from bench.results.comparing import compare
from bench.results.run_data import RunData
from bench.results.store import RUN, write_run
from bench.results.summary import summarise
from bench.traffic.plan import Plan

TOKEN_IDS = ("--token-ids", "3..99")
MARKUP = "[red]mine[/] [/x]"


def data(label: str = "a", **plan: Any) -> RunData:
    facts = {
        "kind": "measured",
        "label": label,
        "plan": {"workload": "chat", "duration_s": 10.0, "rate_per_s": 1.0, "request_count": 10, **plan},
        "model": "m",
        "valid": True,
        "invalid_reasons": [],
    }
    return RunData(facts, [record(index, at_s=float(index)) for index in range(10)])


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reaching for the target is what must not happen."""

    async def reach(*_: Any) -> Reached:
        raise AssertionError("the target was reached for")

    monkeypatch.setattr(command, "reach", reach)


def shown(renderable: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


@pytest.mark.usefixtures("no_server")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--max-in-flight", "0"), "--max-in-flight 0"),
        (("--channels", "0"), "--channels 0"),
        (("--timeout", "-1"), "--timeout -1"),
        (("--timeout", "0"), "--timeout 0"),
        (("--timeout", "nan"), "--timeout nan"),
        (("--requests", "-5"), "--requests -5"),
        (("--requests", "0"), "--requests 0"),
    ],
)
def test_a_number_that_cannot_be_is_a_wrong_command_line(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "run", *TOKEN_IDS, *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.usefixtures("no_server")
@pytest.mark.parametrize(
    "arguments",
    [
        ("--target", "http://user:secret@127.0.0.1:9"),
        ("--target", "baton://user:secret@127.0.0.1:9"),
        ("--target", "user:secret@127.0.0.1:9"),
        ("--metrics-url", "https://secret@127.0.0.1:9/metrics"),
    ],
)
def test_a_password_in_an_address_is_refused_and_not_repeated(
    arguments: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "run", *TOKEN_IDS, *arguments]) == 2
    said = capsys.readouterr().err
    assert arguments[0] in said
    assert "--api-key-env" in said
    assert "secret" not in said


@pytest.mark.usefixtures("no_server")
def test_a_place_that_cannot_be_written_is_said_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["bench", "run", *TOKEN_IDS, "--out", str(tmp_path / "file" / "run")]) == 2
    assert f"--out {tmp_path / 'file' / 'run'} cannot be written" in capsys.readouterr().err


@pytest.mark.usefixtures("no_server")
def test_a_sweep_looks_for_earlier_runs_before_its_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "rate-2", data())
    assert main(["bench", "run", *TOKEN_IDS, "--rates", "1,2", "--out", str(tmp_path)]) == 1
    assert f"{tmp_path / 'rate-2' / RUN}: there is a run here already" in capsys.readouterr().err
    assert not (tmp_path / "rate-1").exists()


def test_an_interrupted_sweep_reports_the_rates_that_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def close() -> None:
        pass

    async def reach(*_: Any) -> Any:
        target = SimpleNamespace(model="m", close=close)
        return Reached(target=target, facts={}, label="fake")  # type: ignore[arg-type]

    async def measure(plan: Plan, *_: Any) -> RunData:
        if plan.facts["rate_per_s"] == 2:
            os.kill(os.getpid(), signal.SIGINT)
            async with asyncio.timeout(60):
                await asyncio.Event().wait()
        return data(label="ended")

    monkeypatch.setattr(command, "reach", reach)
    monkeypatch.setattr("bench.generator.measure.measure", measure)
    (tmp_path / "x").mkdir()  # as the first run would have
    arguments = ("--rates", "1,2", "--duration", "5", "--context", "512", "--quiet", "--out", str(tmp_path / "x"))
    assert main(["bench", "run", *TOKEN_IDS, *arguments]) == 130
    assert "interrupted after 1 of 2 rates, which are reported in" in capsys.readouterr().err
    assert "ended" in (tmp_path / "x" / "report.html").read_text(encoding="utf-8")


def test_a_label_is_no_markup_in_a_table() -> None:
    assert f"{MARKUP}: chat" in shown(run_table(summarise(data(MARKUP))))
    assert f"B = {MARKUP} against A = a" in shown(table(compare([data()], [data(MARKUP)], metrics=("ttft_s",))))


def test_a_run_shows_what_would_make_its_plan_again() -> None:
    trace = {"name": "day.jsonl", "sha256": "ab12cd"}
    run = data(seed=77, pacer={"name": "gamma", "spelling": "gamma:2,cv=3"}, trace=trace)
    lines = shown(run_table(summarise(run), run.facts)).splitlines()
    assert [
        line.split(maxsplit=1)[1].rstrip() for line in lines if line.startswith(("seed ", "pacer ", "trace "))
    ] == [
        "77",
        "gamma:2,cv=3",
        "day.jsonl, sha256 ab12cd",
    ]
