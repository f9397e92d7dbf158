"""The baton command: the phase table, one helpful line per error, exit codes, and a conversation that survives."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from baton import errors
from baton.__main__ import main
from baton.admin_client import ClusterView, PhaseView, WorkerView
from baton.cli import exits
from baton.cli.chat import Chat
from baton.cli.generate import add_mode_arguments, add_sampling_arguments, logprob_lines, modes_of
from baton.cli.phase_table import human_bytes, phase_lines
from baton.cli.top import frame
from baton.client import BatonClient, Chunk, Event, Finished, PhaseTimings, Started, TokenLogprob
from baton.errors import FieldViolation
from baton.leg import RecomputeReason
from baton.request import (
    ChatMessage,
    FinishReason,
    Handover,
    PlacementMode,
    Sampling,
    StopConditions,
    Structure,
    StructureKind,
    Usage,
)
from baton.timeline import PHASES, Phase
from baton.transfer_report import TransferReport
from fleet.cli import next_steps
from fleet.state_dir import FleetRecord

SECONDS = {
    Phase.QUEUE: 0.001,
    Phase.PREFILL: 0.050,
    Phase.HANDOFF_WAIT: 0.002,
    Phase.KV_TRANSFER: 0.004,
    Phase.DECODE_WAIT: 0.003,
    Phase.DECODE: 0.940,
}


def finished(**changes: Any) -> Finished:
    values: dict[str, Any] = {
        "seconds": SECONDS,
        "time_to_first_token_s": 0.052,
        "transfer": TransferReport(4 * 1024 * 1024, 60, 1, 0.0005, 0.002, 0.001),
        "handover": Handover.OUTPUT_INJECTION,
        "prefill_worker_id": "prefill-0",
        "decode_worker_id": "decode-0",
        "attempt_count": 1,
        "placement_mode": PlacementMode.SPLIT,
        "placement_reason": "split",
    }
    phases = PhaseTimings(**{**values, **changes})
    return Finished(FinishReason.MAX_OUTPUT_TOKENS, None, None, Usage(100, 95, 0), phases)


def test_the_table_shows_every_phase_its_sum_bytes_bandwidth_and_who_served() -> None:
    text = "\n".join(phase_lines(finished(), client_total_s=1.001))
    for expected in (
        "queue", "prefill", "handoff wait", "KV transfer", "decode wait", "decode",
        "1000.00", "1001.00", "4 MiB at 1000 MiB/s", "52.0 ms", "99.2 after the first",
        "100 in (0 from cache), 95 out",
        "split (split), prefill-0 → decode-0", "max output tokens",
        "1 pull of 60 regions: post 0.50 ms, wire 2.00 ms, verify 1.00 ms, 1.95 GiB/s on the wire",
    ):  # fmt: skip
        assert expected in text


def test_the_table_of_an_answer_that_needed_no_transfer_divides_by_nothing() -> None:
    nothing = finished(
        seconds=dict.fromkeys(PHASES, 0.0), time_to_first_token_s=None, decode_worker_id="", placement_mode=None,
        transfer=TransferReport(recomputed_token_count=7, recompute_reason=RecomputeReason.STALE),
    )  # fmt: skip
    text = "\n".join(phase_lines(nothing))
    assert "nothing moved" in text
    assert "7 prompt tokens" in text
    assert "(stale)" in text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1.38 * 2**20, "1.38 MiB"),
        (1010 * 2**10, "1010 KiB"),
        (2**41, "2 TiB"),
    ],
)
def test_bytes_are_said_in_binary_units(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.invalid_request([FieldViolation("a", "b"), FieldViolation("c", "d")]), 2),
        (errors.model_not_found("x", ["y"]), 2),
        (errors.no_worker("decode", 0), 3),
        (errors.queue_full(1, 1, 1.0), 3),
        (errors.attempts_exhausted(3, 5, "decode", "lost"), 3),
        (errors.deadline_exceeded("prefill", 0), 4),
        (errors.internal("x"), 1),
    ],
)
def test_errors_are_one_line_and_have_their_exit_code(error: errors.BatonError, code: int) -> None:
    line = exits.error_line(error, "127.0.0.1:1")
    assert "\n" not in line
    assert line.startswith("baton: ")
    assert exits.exit_code(error) == code
    if error.violations:
        assert all(violation.field in line for violation in error.violations)


@pytest.mark.parametrize("command", [["generate", "hi"], ["top", "--once"], ["health"]])
def test_without_a_server_the_commands_say_what_to_do_and_exit_with_3(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--address", "127.0.0.1:1"]) == 3
    said = capsys.readouterr().err
    assert "127.0.0.1:1" in said
    assert said.count("\n") == 1


def test_a_wrong_number_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "hi", "--timeout", "0"]) == 2
    assert "timeout" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["generate", "hi", "--max-tokens", "many"])
    assert left.value.code == 2


def test_cluster_commands_without_the_fleet_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("baton.__main__._is_installed", lambda module: False)
    assert main(["up"]) == 2
    assert "needs baton-serve" in capsys.readouterr().err


def test_a_frame_of_top_shows_workers_and_phases() -> None:
    from rich.console import Console

    view = ClusterView(
        workers=(WorkerView("decode-0", "decode", "127.0.0.1:9", "ready", 3, 2, 1, 50, 100, 4, "e", 2.5e9, 0.031),),
        phases=(PhaseView("kv_transfer", 10, 1.25, 2.5), PhaseView("decode", 0, 0.0, 0.0)),
        queued_count=7, in_flight_count=9, finished_count=11, failed_count=1, is_serving=True,
    )  # fmt: skip
    for width in (78, 140):
        console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(frame(view, "127.0.0.1:50052", width))
        text = console.export_text()
        for expected in (
            "serving",
            "queued 7",
            "decode-0",
            "ready",
            "50% 50/100",
            "KV transfer",
            "1.2",
            "2.5",
            "–",
            "2.50",
            "3.1%",
        ):
            assert expected in text
        assert ("127.0.0.1:9" in text) == (width == 140)


def parsed(*command: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_sampling_arguments(parser)
    add_mode_arguments(parser)
    return parser.parse_args(command)


def test_every_option_of_generate_reaches_the_request(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    assert modes_of(parsed()) == (Sampling(), StopConditions())
    sampling, stop = modes_of(
        parsed(
            *("--temperature", "0.7", "--seed", "5", "--top-p", "0.9", "--top-k", "40", "--min-p", "0.1"),
            *("--presence-penalty", "-1", "--frequency-penalty", "0.5", "--repetition-penalty", "1.2"),
            *(
                "--max-tokens",
                "9",
                "--min-tokens",
                "3",
                "--stop",
                "x",
                "--stop-token-id",
                "7",
                "--stop-token-id",
                "8",
            ),
            *("--json-schema", str(schema)),
        )
    )
    structure = Structure(StructureKind.JSON_SCHEMA, '{"type": "object"}')
    assert sampling == Sampling(0.7, 0.9, 40, 0.1, 5, -1.0, 0.5, 1.2, structure=structure)
    assert stop == StopConditions(9, ("x",), (7, 8), min_output_token_count=3)
    grammar = tmp_path / "answer.ebnf"
    grammar.write_text('root ::= "a"')
    for command, expected in (
        (("--regex", "a+"), Structure(StructureKind.REGEX, "a+")),
        (("--choice", "yes", "--choice", "no"), Structure(StructureKind.CHOICE, choices=("yes", "no"))),
        (("--grammar", str(grammar)), Structure(StructureKind.GRAMMAR, 'root ::= "a"')),
        (("--json-object",), Structure(StructureKind.JSON_OBJECT)),
    ):
        assert modes_of(parsed(*command))[0].structure == expected


def test_two_structures_and_a_file_that_is_not_there_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parsed("--regex", "a", "--choice", "b")
    assert left.value.code == 2
    assert main(["generate", "hi", "--json-schema", "/nowhere/schema.json", "--address", "127.0.0.1:1"]) == 2
    assert "/nowhere/schema.json" in capsys.readouterr().err


def test_logprobs_are_a_line_per_token_with_its_text_rank_and_rivals_and_their_sum() -> None:
    lines = logprob_lines(
        [(" Paris", TokenLogprob(7, -0.25, 1, ((7, -0.25), (9, -2.0)))), ("", TokenLogprob(2, -1.0, 3, ()))], -1.25
    )
    assert len(lines) == 4
    for expected in ("0", "7", "-0.2500", "1", '" Paris"', "7 -0.250, 9 -2.000"):
        assert expected in lines[1]
    assert lines[3].split() == ["sum", "-1.2500"]


class ScriptedClient:
    """A client whose answers are scripted: text, an error, or a wait for ever."""

    def __init__(self, *answers: str | errors.BatonError | None) -> None:
        self._answers = list(answers)
        self.asked: list[list[ChatMessage]] = []
        self.is_waiting = asyncio.Event()

    async def chat(self, messages: list[ChatMessage], **_: object) -> AsyncGenerator[Event, None]:
        self.asked.append(messages)
        answer = self._answers.pop(0)
        yield Started("g", "m", 1)
        if isinstance(answer, errors.BatonError):
            raise answer
        if answer is None:
            yield Chunk(0, "half", (), 1)
            self.is_waiting.set()
            await asyncio.sleep(3600)
        else:
            yield Chunk(0, answer, (), 1)
        yield finished()


def arguments(**changes: Any) -> argparse.Namespace:
    values: dict[str, Any] = {
        "system": None, "timeout": 1.0, "model": "", "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
        "seed": None, "max_tokens": None, "stop": [], "phases": False,
    }  # fmt: skip
    return argparse.Namespace(**{**values, **changes})


async def test_a_conversation_keeps_what_was_said_and_forgets_what_failed() -> None:
    client = ScriptedClient("one", errors.no_worker("decode", 0), None, "four")
    chat = Chat(arguments(system="be brief"), cast(BatonClient, client))
    await chat.answer("1")
    with pytest.raises(errors.BatonError):
        await chat.answer("2")
    task = asyncio.create_task(chat.answer("3"))
    await client.is_waiting.wait()
    task.cancel()  # what Ctrl-C does
    with pytest.raises(asyncio.CancelledError):
        await task
    await chat.answer("4")
    assert [(m.role, m.content) for m in client.asked[3]] == [
        ("system", "be brief"),
        ("user", "1"),
        ("assistant", "one"),
        ("user", "3"),
        ("assistant", "half"),
        ("user", "4"),
    ]
    chat.clear()
    assert [m.role for m in chat.messages] == ["system"]


def test_what_up_suggests_works_as_it_stands() -> None:
    usual = FleetRecord("baton", "ray", "deploy/baton.toml", 1, "1", "127.0.0.1:50051", "127.0.0.1:50052")
    assert not any("--address" in line or "--config" in line for line in next_steps(usual))
    other = replace(usual, config_path="my clusters/two.toml", address="127.0.0.1:1", admin_address="127.0.0.1:2")
    ask, watch, stop = next_steps(other)
    assert ask.endswith("--address 127.0.0.1:1")
    assert watch.endswith("baton top --address 127.0.0.1:2")
    assert stop.endswith("baton down --config 'my clusters/two.toml'")


def test_a_narrow_terminal_keeps_the_workers_names() -> None:
    from rich.console import Console

    worker = WorkerView("prefill-10", "prefill", "127.0.0.1:9", "ready", 3, 2, 1, 50, 182, 4, "e")
    view = ClusterView((worker,), (), 0, 0, 0, 0, True)
    console = Console(width=64, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(frame(view, "127.0.0.1:50052", 64))
    assert "prefill-10" in console.export_text()
