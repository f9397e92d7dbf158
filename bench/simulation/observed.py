"""What a calibration observed, kept: a JSON line a step and an answer, so that a fit can be made again and judged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.simulation.steps import Part, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One request as its caller saw it. Times are seconds of CLOCK_MONOTONIC, as the steps'."""

    generation_id: str
    prompt_token_count: int
    was_alone: bool
    sent_at: float
    token_at: tuple[float, ...]
    """Of each token, when its message came."""
    kv_transfer_bytes: int
    cached_token_count: int
    prefill_worker_id: str
    decode_worker_id: str


@dataclass(frozen=True, slots=True)
class Observed:
    """Of one cluster, on one clock."""

    cluster: str
    """Such as "1 prefill + 1 decode"."""
    steps: tuple[Step, ...]
    answers: tuple[Answered, ...]
    machine: Mapping[str, Any] = field(default_factory=dict)
    """``bench.machine.machine_facts`` of when it was observed."""


def to_lines(observed: Iterable[Observed]) -> Iterator[str]:
    for each in observed:
        yield json.dumps({"record": "cluster", "cluster": each.cluster, "machine": dict(each.machine)})
        for step in each.steps:
            yield json.dumps({"record": "step", **asdict(step)}, separators=(",", ":"))
        for answer in each.answers:
            yield json.dumps({"record": "answer", **asdict(answer)}, separators=(",", ":"))


def from_lines(lines: Iterable[str]) -> list[Observed]:
    """Raises ``ValueError`` for lines that ``to_lines`` did not write."""
    found: list[_Read] = []
    for number, line in enumerate(lines, start=1):
        try:
            _read(json.loads(line), found)
        except (KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
            raise ValueError(f"line {number}: no record of a calibration ({type(error).__name__})") from error
    return [Observed(each.cluster, tuple(each.steps), tuple(each.answers), each.machine) for each in found]


@dataclass(slots=True)
class _Read:
    cluster: str
    machine: dict[str, Any]
    steps: list[Step] = field(default_factory=list)
    answers: list[Answered] = field(default_factory=list)


def _read(document: dict[str, Any], found: list[_Read]) -> None:
    match document.pop("record"):
        case "cluster":
            found.append(_Read(str(document["cluster"]), dict(document["machine"])))
        case "step":
            parts = tuple(Part(**part) for part in document.pop("parts"))
            found[-1].steps.append(Step(parts=parts, **document))
        case "answer":
            found[-1].answers.append(Answered(token_at=tuple(document.pop("token_at")), **document))
        case other:
            raise KeyError(other)
