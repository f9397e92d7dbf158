"""A server's log tells where an exception came from and never what it says: its text may quote a prompt."""

from __future__ import annotations

import asyncio
import gc
import io
import logging

import pytest

from baton.errors import queue_full
from baton.event_loop import runner
from baton.log_lines import FORMAT, FramesOnly, said_of

CANARY = "the secret of the prompt"


def fail_with_the_prompt() -> None:
    try:
        dict.fromkeys("x")[CANARY]
    except KeyError as error:
        raise ValueError(f"cannot read {CANARY}") from error


def test_a_traceback_in_the_log_has_frames_and_types_and_no_text() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(FramesOnly(FORMAT))
    logger = logging.Logger("test")  # one that no other test sees
    logger.addHandler(handler)
    try:
        fail_with_the_prompt()
    except ValueError:
        logger.exception("a bug in %s", "the test")
    said = stream.getvalue()
    assert "ERROR test: a bug in the test" in said
    assert "in fail_with_the_prompt" in said
    assert [line for line in said.splitlines() if line in ("KeyError", "ValueError")] == ["KeyError", "ValueError"]
    assert CANARY not in said


def test_what_baton_itself_says_is_told() -> None:
    assert said_of(queue_full(3, 3, 1.0)).startswith("Overloaded: ")


def test_errors_that_cause_each_other_end_somewhere() -> None:
    first, second = ValueError("a"), KeyError("b")
    first.__cause__, second.__cause__ = second, first
    assert said_of(first) == "KeyError\nValueError"
    assert said_of(None) == ""


def test_a_task_that_nobody_awaited_is_told_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    async def forget() -> None:
        async def lost() -> None:
            fail_with_the_prompt()

        task = asyncio.create_task(lost(), name="the lost task")
        await asyncio.wait([task])
        del task
        gc.collect()

    with runner() as loop:
        loop.run(forget())
    assert "the lost task" in caplog.text
    assert "ValueError" in caplog.text
    assert CANARY not in caplog.text
