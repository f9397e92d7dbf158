"""How a server's log lines are made: one format, and never the text of a foreign exception.

Prompts and outputs do not reach logs. The text of an exception that is not ours may quote one (a KeyError shows the
key, a ValueError the value), so a traceback shows frames and types; only of Baton's own errors the message is told.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from types import TracebackType
from typing import Any

from baton.errors import BatonError

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def log_to_stderr(level: str | int = logging.INFO) -> None:
    """For a process's start; does nothing where logging is configured already."""
    handler = logging.StreamHandler()
    handler.setFormatter(FramesOnly(FORMAT))
    logging.basicConfig(level=level, handlers=[handler])


class FramesOnly(logging.Formatter):
    """Formats like its base, but for exceptions."""

    def formatException(self, ei: _ExcInfo) -> str:  # the base's name
        return said_of(ei[1])


def report_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """A loop's exception handler: asyncio's own prints the exception's text, which may quote a prompt."""
    task = context.get("task") or context.get("future")
    name = f" in {task.get_name()}" if isinstance(task, asyncio.Task) else ""
    error = context.get("exception")
    logging.getLogger("baton.loop").error("%s%s\n%s", context.get("message", "an error"), name, said_of(error))


def said_of(error: BaseException | None) -> str:
    """Frames and types of an exception and of those it came from, the first cause first."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    parts = []
    for each in reversed(chain):
        said = f": {each.message}" if isinstance(each, BatonError) else ""
        parts.append("".join(traceback.format_tb(each.__traceback__)) + type(each).__qualname__ + said)
    return "\n".join(parts)
