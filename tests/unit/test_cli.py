"""The baton command: the phase table, one helpful line per error, exit codes, and a conversation that survives."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from baton import errors
from baton.__main__ import main
from baton.cli import exits
from baton.cli.arguments import (
    UsageError,
    add_generation_arguments,
    conversation_of,
    options_of,
    prompt_of,
    sampling_of,
    stop_of,
)
from baton.cli.chat import Chat
from baton.cli.generate import Printer, logprob_lines
from baton.cli.json_lines import error_as_json, event_as_json, json_line, model_as_json, status_as_json
from baton.cli.models import model_lines
from baton.cli.phase_table import human_bytes, phase_lines, summary_line
from baton.cli.top import frame
from baton.client import BatonClient, Chunk, Event, Finished, PhaseTimings, Started, TokenLogprob
from baton.errors import FieldViolation
from baton.events import PromptPart, SampleResult
from baton.leg import RecomputeReason
from baton.models import Capabilities, Model
from baton.request import (
    ChatMessage,
    ChatPrompt,
    FinishReason,
    Handover,
    PlacementMode,
    Sampling,
    StopConditions,
    Structure,
    StructureKind,
    TextPrompt,
    TokenPrompt,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
    Usage,
)
from baton.status_client import PhaseStatus, ServiceStatus, WorkerStatus
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
        (errors.unauthenticated(), 5),
    ],
)
def test_errors_are_one_line_and_have_their_exit_code(error: errors.BatonError, code: int) -> None:
    line = exits.error_line(error, "127.0.0.1:1")
    assert "\n" not in line
    assert line.startswith("baton: ")
    assert exits.exit_code(error) == code
    if error.violations:
        assert all(violation.field in line for violation in error.violations)


@pytest.mark.parametrize(
    "command", [["generate", "hi"], ["top", "--once"], ["top", "--json"], ["health"], ["models"]]
)
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

    status = ServiceStatus(
        workers=(WorkerStatus("decode-0", "decode", "ready", 3, 2, 1, 50, 100, 4, 2.5e9, 0.031, 12, 37),),
        phases=(PhaseStatus("kv_transfer", 10, 0.00125, 0.0025), PhaseStatus("decode", 0, 0.0, 0.0)),
        queued_count=7, in_flight_count=9, finished_count=11, failed_count=1, is_serving=True,
    )  # fmt: skip
    for width in (78, 140):
        console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(frame(status, "127.0.0.1:50051", width))
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
        for only_wide in ("no room", "quarantine", "37"):
            assert (only_wide in text) == (width == 140)


def parsed(*command: str, **more: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_generation_arguments(parser)
    values = {"raw": False, "token_ids": False, "system": None, **more}
    return argparse.Namespace(**{**vars(parser.parse_args(command)), **values})


def test_every_option_of_generate_reaches_the_request(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    assert (sampling_of(parsed()), stop_of(parsed())) == (Sampling(), StopConditions())
    said = parsed(
        *("--temperature", "0.7", "--seed", "5", "--top-p", "0.9", "--top-k", "40", "--min-p", "0.1"),
        *("--presence-penalty", "-1", "--frequency-penalty", "0.5", "--repetition-penalty", "1.2"),
        *("--logit-bias", "7=-1.5", "--logit-bias", "9=2", "--allowed-token-ids", "7,9,11"),
        *("--bad-token-ids", "7,9", "--bad-token-ids", "11"),
        *("--max-tokens", "9", "--min-tokens", "3", "--stop", "x", "--stop-token-id", "7", "--stop-token-id", "8"),
        *("--ignore-eos", "--json-schema", str(schema), "--model", "m", "--tenant", "t", "--session-id", "s"),
        *("--correlation-id", "c", "--priority", "-3", "--resume"),
    )
    structure = Structure(StructureKind.JSON_SCHEMA, '{"type": "object"}')
    sampling = Sampling(
        *(0.7, 0.9, 40, 0.1, 5, -1.0, 0.5, 1.2), ((7, -1.5), (9, 2.0)), (7, 9, 11), ((7, 9), (11,)), structure
    )
    stop = StopConditions(9, ("x",), (7, 8), ignore_eos=True, min_output_token_count=3)
    assert options_of(said, sample_count=2) == {
        "model": "m", "sampling": sampling, "stop": stop, "output": None, "priority": -3, "session_id": "s",
        "correlation_id": "c", "tenant": "t", "sample_count": 2, "resume": True,
    }  # fmt: skip
    grammar = tmp_path / "answer.ebnf"
    grammar.write_text('root ::= "a"')
    for command, expected in (
        (("--regex", "a+"), Structure(StructureKind.REGEX, "a+")),
        (("--choice", "yes", "--choice", "no"), Structure(StructureKind.CHOICE, choices=("yes", "no"))),
        (("--grammar", str(grammar)), Structure(StructureKind.GRAMMAR, 'root ::= "a"')),
        (("--json-object",), Structure(StructureKind.JSON_OBJECT)),
    ):
        assert sampling_of(parsed(*command)).structure == expected


def test_a_prompt_is_a_chat_a_text_or_token_ids() -> None:
    assert prompt_of(parsed(system="brief"), "hi") == ChatPrompt(
        (ChatMessage("system", "brief"), ChatMessage("user", "hi"))
    )
    assert prompt_of(parsed(raw=True), "hi") == TextPrompt("hi")
    assert prompt_of(parsed(token_ids=True), "5, 17 42") == TokenPrompt((5, 17, 42))
    with pytest.raises(UsageError, match="whole numbers"):
        prompt_of(parsed(token_ids=True), "five")


def test_tools_their_choice_and_template_arguments_reach_the_conversation(tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text('[{"name": "add", "description": "adds", "parameters": {"type": "object"}}]')
    message = [ChatMessage("user", "hi")]
    template = ("--template-argument", "enable_thinking=false", "--template-argument", "style=terse")
    prompt = conversation_of(parsed("--tools", str(tools), "--tool-choice", "add", *template), message)
    (tool,) = prompt.tools
    assert (tool.name, json.loads(tool.parameters_json_schema)) == ("add", {"type": "object"})
    assert (prompt.tool_choice, prompt.tool_name) == (ToolChoice.REQUIRED, "add")
    assert json.loads(prompt.template_arguments_json) == {"enable_thinking": False, "style": "terse"}
    assert (
        conversation_of(parsed("--tools", str(tools), "--tool-choice", "none"), message).tool_choice
        is ToolChoice.NONE
    )
    for content, word in (("{", "no JSON"), ("{}", "JSON list")):
        tools.write_text(content)
        with pytest.raises(UsageError, match=word):
            conversation_of(parsed("--tools", str(tools)), message)


@pytest.mark.parametrize(
    "command",
    [
        ("--logit-bias", "7"),
        ("--logit-bias", "x=1"),
        ("--allowed-token-ids", "a"),
        ("--template-argument", "x"),
        ("--template-argument", "x=[1]"),
    ],
)
def test_what_an_option_cannot_read_is_a_usage_error(command: tuple[str, str]) -> None:
    with pytest.raises(SystemExit) as left:
        parsed(*command)
    assert left.value.code == 2


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


def test_the_line_after_an_answer_says_tokens_pace_first_token_and_every_phase() -> None:
    assert summary_line(finished()) == (
        "[95 tokens, 99.2 tokens/s, first after 52 ms; ms: queue 1.0, prefill 50.0, handoff wait 2.0, "
        "KV transfer 4.0, decode wait 3.0, decode 940.0]"
    )
    one = replace(finished(time_to_first_token_s=None), usage=Usage(1, 1, 0), resume_count=2)
    assert summary_line(one).startswith("[1 token, resumed 2 times; ms: queue")


def test_the_answer_goes_to_stdout_and_the_thinking_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    printer = Printer()
    call = ToolCall("c1", "add", '{"a": 1}')
    for event in (
        Started("g", "m", 3),
        PromptPart(0, "asked ", (), 3),
        Chunk(0, "", (), 1, reasoning_text="let me "),
        Chunk(1, "", (), 1, reasoning_text="see"),
        Chunk(2, "one", (), 1),
        Chunk(3, "", (), 1, tool_call_deltas=(ToolCallDelta(0, "c1", "add", '{"a": 1}'),)),
        replace(finished(), tool_calls=(call,)),
    ):
        printer.take(event)
    out, err = capsys.readouterr()
    assert err == "let me see\n"
    assert out == 'asked one\n{"tool_call": {"id": "c1", "name": "add", "arguments_json": "{\\"a\\": 1}"}}\n'


def test_several_samples_are_printed_one_after_another_under_their_numbers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    printer = Printer(is_several=True)
    reason = FinishReason.STOP
    results = tuple(SampleResult(index, reason, None, None, 2) for index in range(2))
    for event in (
        Chunk(0, "a", (), 1), Chunk(0, "x", (), 1, sample_index=1), Chunk(1, "b", (), 1),
        Chunk(1, "y", (), 1, sample_index=1), replace(finished(), samples=results),
    ):  # fmt: skip
        printer.take(event)
    assert capsys.readouterr().out == "--- sample 0\nab\n--- sample 1\nxy\n"


def test_json_lines_say_everything_but_secrets() -> None:
    started = event_as_json(Started("g", "m", 3, "a-secret", 30.0, 120.0))
    assert (started["event"], started["resume_grace_s"], started["time_allowed_s"]) == ("started", 30.0, 120.0)
    assert "a-secret" not in json_line(started)
    error = error_as_json(errors.queue_full(3, 2, 1.5))
    assert (error["event"], error["status"], error["reason"]) == ("error", "RESOURCE_EXHAUSTED", "QUEUE_FULL")
    assert (error["retry_after_s"], error["is_retryable"]) == (1.5, True)
    ruled_out = TokenLogprob(7, 0.0, 1, ((7, 0.0), (8, float("-inf"))))
    assert json.loads(json_line(event_as_json(Chunk(0, "a", (7,), 1, (ruled_out,)))))["logprobs"][0]["top"] == [
        [7, 0.0],
        [8, None],  # JSON has no infinity
    ]
    last = event_as_json(replace(finished(), samples=(SampleResult(0, None, None, None, 2),), resume_count=1))
    assert (last["samples"][0]["reason"], last["resume_count"]) == (None, 1)
    assert next(iter(event_as_json(PromptPart(0, "a", (1,), 1)))) == "event"


def test_the_page_of_the_command_line_names_every_field_of_json() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "api" / "cli.md").read_text(encoding="utf-8")
    model = Model("m", 8, 4, (), (), "", Capabilities())
    objects: list[dict[str, Any]] = [
        event_as_json(Started("g", "m", 3)),
        event_as_json(PromptPart(0, "a", (1,), 1, (TokenLogprob(1, -1.0, 1, ()),))),
        event_as_json(Chunk(0, "a", (1,), 1)),
        event_as_json(replace(finished(), samples=(SampleResult(0, None, None, None, 2),))),
        error_as_json(errors.invalid_request([FieldViolation("a", "b")])),
        model_as_json(model),
        status_as_json(
            ServiceStatus(
                True,
                0,
                0,
                0,
                0,
                (WorkerStatus("w", "decode", "ready", 0, 0, 0, 0, 0, 0),),
                (PhaseStatus("p", 0, 0.0, 0.0),),
            )
        ),
    ]

    def names(value: Any) -> set[str]:
        if isinstance(value, dict):
            return set(value) | {name for each in value.values() for name in names(each)}
        return {name for each in value for name in names(each)} if isinstance(value, list) else set()

    assert {name for each in objects for name in names(each) if f"`{name}`" not in page} == set()


def test_a_model_is_told_with_its_limits_and_what_it_can_do() -> None:
    can = Capabilities(True, True, "hermes", "qwen3", ("enable_thinking",), 16, 20, True)
    lines = model_lines(Model("m", 8192, 49152, (), (2, 7), "{{ }}", can))
    assert lines[0] == "m"
    for words in (
        "8192 tokens",
        "49152",
        "2, 7",
        "chat, tools (hermes), thinking (qwen3), resume",
        "16 samples",
        "enable_thinking",
    ):
        assert words in "\n".join(lines)
    assert "no chat template" in "\n".join(model_lines(Model("m", 8, 4, (), (), "", Capabilities())))


class ScriptedClient:
    """A client whose answers are scripted: text, an error, or a wait for ever."""

    def __init__(self, *answers: str | errors.BatonError | None) -> None:
        self._answers = list(answers)
        self.asked: list[list[ChatMessage]] = []
        self.is_waiting = asyncio.Event()

    async def generate(self, prompt: ChatPrompt, **_: object) -> AsyncGenerator[Event, None]:
        self.asked.append(list(prompt.messages))
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


async def test_a_conversation_keeps_what_was_said_and_forgets_what_failed() -> None:
    client = ScriptedClient("one", errors.no_worker("decode", 0), None, "four")
    chat = Chat(parsed(system="be brief", phases=False, quiet=False, json=False), cast(BatonClient, client))
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
    assert watch.endswith("baton top --address 127.0.0.1:1")
    assert stop.endswith("baton down --config 'my clusters/two.toml'")
    ask, watch, stop = next_steps(usual, has_tls=True)
    assert (ask.endswith("--tls-ca FILE"), watch.endswith("--tls-ca FILE"), "--tls" in stop) == (True, True, False)


def test_a_narrow_terminal_keeps_the_workers_names() -> None:
    from rich.console import Console

    worker = WorkerStatus("prefill-10", "prefill", "ready", 3, 2, 1, 50, 182, 4)
    status = ServiceStatus(True, 0, 0, 0, 0, (worker,), ())
    console = Console(width=64, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(frame(status, "127.0.0.1:50051", 64))
    assert "prefill-10" in console.export_text()
