"""docs/errors.md is complete: every reason, with the statuses, metadata and retry advice that the code gives."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from baton import errors
from baton.errors import BatonError, FieldViolation, Reason
from baton.v1 import errors_pb2

PAGE = Path(__file__).resolve().parents[2] / "docs" / "errors.md"
PREFIX = "ERROR_REASON_"


@dataclass(frozen=True)
class Line:
    """A line of one of the page's tables of reasons."""

    statuses: frozenset[str]
    metadata: frozenset[str]
    has_retry: bool


def lines_of(text: str) -> dict[str, Line]:
    found: dict[str, Line] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and re.fullmatch(r"`[A-Z_]+`", cells[0]):
            reason = cells[0].strip("`")
            assert reason not in found, f"{reason} has two lines"
            assert all(cells[place] for place in (1, 2, 5)), f"{reason}: status, when and what to do are never empty"
            found[reason] = Line(_quoted(cells[1]), _quoted(cells[3]), cells[4] == "yes")
    return found


def _quoted(cell: str) -> frozenset[str]:
    return frozenset(re.findall(r"`([^`]+)`", cell))


def made() -> dict[str, list[BatonError]]:
    """What every constructor of baton/errors.py gives, with something sent already and with nothing."""
    found = defaultdict(list)
    for make in constructors():
        for number in (0, 1):
            error = make(**dict(_arguments(make, number)))
            found[error.reason.value].append(error)
    return found


def constructors() -> list[Callable[..., BatonError]]:
    return [
        each
        for name, each in vars(errors).items()
        if inspect.isfunction(each)
        and not name.startswith("_")
        and each.__annotations__.get("return") == "BatonError"
    ]


def _arguments(make: Callable[..., BatonError], number: int) -> Iterator[tuple[str, Any]]:
    values: dict[str, Any] = {
        "str": "x",
        "int": number,
        "float": 1.5,
        "bool": False,
        "Sequence[str]": ["x"],
        "Sequence[FieldViolation]": [FieldViolation("text", "is empty")],
    }
    for name, parameter in inspect.signature(make).parameters.items():
        yield name, values[parameter.annotation]


LINES = lines_of(PAGE.read_text(encoding="utf-8"))
MADE = made()


def test_page_code_and_proto_have_the_same_reasons() -> None:
    of_proto = {name.removeprefix(PREFIX) for name in errors_pb2.ErrorReason.DESCRIPTOR.values_by_name} - {
        "UNSPECIFIED"
    }
    assert set(LINES) == of_proto == {reason.value for reason in Reason} == set(MADE)


@pytest.mark.parametrize("reason", list(LINES))
def test_a_line_says_what_the_code_gives(reason: str) -> None:
    line, given = LINES[reason], MADE[reason]
    assert line.statuses == {error.status.value for error in given}
    assert line.metadata == {key for error in given for key in error.metadata}
    assert {line.has_retry} == {error.retry_after_s is not None for error in given}


def test_a_wrong_page_is_noticed() -> None:
    line = "| `NO_ROOM` | `ABORTED` | when | `a`, `b` | yes | do |"
    assert lines_of(f"# Errors\n\n{line}\n") == {"NO_ROOM": Line(frozenset({"ABORTED"}), frozenset({"a", "b"}), True)}
    with pytest.raises(AssertionError, match="two lines"):
        lines_of(f"{line}\n{line}")
    with pytest.raises(AssertionError, match="never empty"):
        lines_of("| `NO_ROOM` | `ABORTED` | when | | yes | |")
