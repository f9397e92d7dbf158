"""How long prompts and answers are: distributions of token counts. Pure, but for reading a trace when asked to.

Values beyond a cut-off are set to it, not drawn again: real traces pile up at the limit of their model, too.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bench.traffic.pacers import spelled_number, split_parameters
from bench.traffic.traces import read_trace

MAX_TOKEN_COUNT = 10_000_000


class Lengths(Protocol):
    """A distribution of token counts."""

    def draw(self, rng: random.Random, scale: float = 1.0) -> int:
        """One count, 1 or more: what is drawn, times ``scale``, rounded to the nearest."""
        ...

    def facts(self) -> dict[str, object]:
        """Fit for JSON: ``name``, ``spelling`` and every parameter, before any scale."""
        ...


@dataclass(frozen=True, slots=True)
class Fixed:
    token_count: int

    def __post_init__(self) -> None:
        _check_range(self.token_count, self.token_count)

    def draw(self, rng: random.Random, scale: float = 1.0) -> int:
        return _scaled(self.token_count, scale)

    def facts(self) -> dict[str, object]:
        return {"name": "constant", "spelling": f"constant:{self.token_count}", "token_count": self.token_count}


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every count from ``low`` to ``high``, both included, is as likely."""

    low: int
    high: int

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)

    def draw(self, rng: random.Random, scale: float = 1.0) -> int:
        return _scaled(self.low + int(rng.random() * (self.high - self.low + 1)), scale)

    def facts(self) -> dict[str, object]:
        return {"name": "uniform", "spelling": f"uniform:{self.low}..{self.high}", "low": self.low, "high": self.high}


@dataclass(frozen=True, slots=True)
class LogNormal:
    """exp of a normal distribution: ``median`` is its median, ``sigma`` the deviation of its logarithm.

    95% are below median * exp(1.645 * sigma).
    """

    median: float
    sigma: float
    low: int = 1
    high: int = MAX_TOKEN_COUNT

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)
        if not (math.isfinite(self.median) and self.low <= self.median <= self.high):
            raise ValueError(f"median {self.median:g} is not within {self.low} and {self.high}")
        if not (math.isfinite(self.sigma) and 0 <= self.sigma <= 10):
            raise ValueError(f"sigma {self.sigma:g} is not within 0 and 10")

    def draw(self, rng: random.Random, scale: float = 1.0) -> int:
        drawn = self.median * math.exp(self.sigma * rng.gauss(0.0, 1.0))
        return _scaled(min(max(drawn, self.low), self.high), scale)

    def facts(self) -> dict[str, object]:
        low = "" if self.low == 1 else f",min={self.low}"
        high = "" if self.high == MAX_TOKEN_COUNT else f",max={self.high}"
        return {
            "name": "lognormal",
            "spelling": f"lognormal:{spelled_number(self.median)},sigma={spelled_number(self.sigma)}{low}{high}",
            "median": self.median,
            "sigma": self.sigma,
            "low": self.low,
            "high": self.high,
        }


@dataclass(frozen=True, slots=True)
class Empirical:
    """One of the given counts, each as likely. ``source``: where they are from, without a machine's paths."""

    token_counts: tuple[int, ...]
    source: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not self.token_counts:
            raise ValueError("an empirical distribution needs values")
        _check_range(min(self.token_counts), max(self.token_counts))

    def draw(self, rng: random.Random, scale: float = 1.0) -> int:
        return _scaled(self.token_counts[int(rng.random() * len(self.token_counts))], scale)

    def facts(self) -> dict[str, object]:
        ordered = sorted(self.token_counts)
        return {
            "name": "empirical",
            "spelling": "empirical",
            "value_count": len(ordered),
            "low": ordered[0],
            "p50": ordered[(len(ordered) - 1) // 2],
            "high": ordered[-1],
            **dict(self.source),
        }


SPELLINGS = {
    "constant": "constant:COUNT",
    "uniform": "uniform:LOW..HIGH",
    "lognormal": "lognormal:MEDIAN,sigma=SIGMA[,min=LOW][,max=HIGH]",
    "empirical": "empirical:TRACE_FILE,of=prompt|output",
}
"""How each is written on a command line; a number alone is a constant."""


def parse_lengths(text: str) -> Lengths:
    """Reads a spelling such as ``lognormal:200,sigma=1,max=2000``. Raises ``ValueError``, saying what is expected."""
    name, colon, rest = text.partition(":")
    if not colon and text.isdecimal():
        return Fixed(int(text))
    if name not in SPELLINGS or not rest:
        raise ValueError(f"{text!r} is no distribution of lengths; there are {', '.join(SPELLINGS.values())}")
    try:
        if name == "constant":
            return Fixed(_whole(rest))
        if name == "uniform":
            low, dots, high = rest.partition("..")
            if not dots:
                raise ValueError("two counts are needed")
            return Uniform(_whole(low), _whole(high))
        if name == "lognormal":
            return _parse_lognormal(rest)
        return _parse_empirical(rest)
    except ValueError as error:
        raise ValueError(f"lengths {text!r}: {error} (expected {SPELLINGS[name]})") from None


def _parse_lognormal(rest: str) -> LogNormal:
    plain, named = split_parameters(rest, {"sigma", "min", "max"})
    if len(plain) != 1 or "sigma" not in named:
        raise ValueError("a median and sigma are needed")
    return LogNormal(
        _real(plain[0]),
        _real(named["sigma"]),
        _whole(named.get("min", "1")),
        _whole(named.get("max", str(MAX_TOKEN_COUNT))),
    )


def _parse_empirical(rest: str) -> Empirical:
    plain, named = split_parameters(rest, {"of"})
    side = named.get("of")
    if len(plain) != 1 or side not in ("prompt", "output"):
        raise ValueError("a trace and of=prompt or of=output are needed")
    trace = read_trace(Path(plain[0]))
    counts = [
        count
        for row in trace.rows
        if (count := row.prompt_token_count if side == "prompt" else row.output_token_count) > 0
    ]
    return Empirical(tuple(counts), (("trace", trace.name), ("trace_sha256", trace.sha256), ("of", side)))


def _scaled(count: float, scale: float) -> int:
    return max(1, math.floor(count * scale + 0.5))


def _check_range(low: int, high: int) -> None:
    if not 1 <= low <= high <= MAX_TOKEN_COUNT:
        raise ValueError(f"token counts from {low} to {high} are not within 1 and {MAX_TOKEN_COUNT}, ascending")


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)


def _real(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
