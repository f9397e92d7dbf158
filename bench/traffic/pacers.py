"""When requests are due: arrival processes, each a value with exact parameters. Pure; randomness is passed in.

Open loop throughout: no pacer ever looks at an answer. In a closed loop a slow server is asked less, so the queue
that a user would stand in never forms, and its latencies never show ("coordinated omission").

That is why a step load is here in two forms. ``steps:`` are stages of arrival rates. ``users:`` are stages of user
counts, where each user *starts* a session every so many seconds by their own clock, whether or not the one before is
through: the load is counted in users, and stays an intention. Users who wait for their answer before they start the
next session are a closed loop and not a pacer; the turns *within* a session do wait (``PlannedRequest.after``).

Renewal processes (Gamma, Weibull) begin in equilibrium: their first gap is drawn from the residual life of a gap, so
that the mean rate holds over any window. Had every gap the same distribution, a run of rate x duration = 100 with a
CV of 4 would see 7.5 requests too many ((CV² - 1) / 2, the renewal theorem).
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

MAX_ARRIVAL_COUNT = 1_000_000
"""No plan is longer: it is held in memory."""


class Pacer(Protocol):
    """An arrival process."""

    @property
    def rate_per_s(self) -> float | None:
        """Mean arrivals per second, where that is one number for the whole run."""
        ...

    @property
    def natural_duration_s(self) -> float | None:
        """How long it lasts by itself; None: as long as is wanted."""
        ...

    def times_s(self, duration_s: float, rng: random.Random) -> list[float]:
        """Arrival times in [0, duration_s), ascending. Raises ``ValueError`` where the duration does not fit it."""
        ...

    def facts(self) -> dict[str, object]:
        """Fit for JSON: ``name``, ``spelling`` and every parameter."""
        ...


@dataclass(frozen=True, slots=True)
class Constant:
    """One every 1 / rate seconds, the first at 0."""

    rate_per_s: float
    natural_duration_s = None

    def __post_init__(self) -> None:
        _check_positive("rate", self.rate_per_s)

    def times_s(self, duration_s: float, rng: random.Random) -> list[float]:
        _check_size(self.rate_per_s * duration_s)
        # Divided each by itself: a sum of intervals would drift.
        return list(
            itertools.takewhile(lambda at_s: at_s < duration_s, (i / self.rate_per_s for i in itertools.count()))
        )

    def facts(self) -> dict[str, object]:
        return {
            "name": "constant",
            "spelling": f"constant:{spelled_number(self.rate_per_s)}",
            "rate_per_s": self.rate_per_s,
        }


@dataclass(frozen=True, slots=True)
class Poisson:
    """Independent arrivals: exponential gaps."""

    rate_per_s: float
    natural_duration_s = None

    def __post_init__(self) -> None:
        _check_positive("rate", self.rate_per_s)

    def times_s(self, duration_s: float, rng: random.Random) -> list[float]:
        return _renewals(duration_s, self.rate_per_s, rng.expovariate(self.rate_per_s), rng.expovariate)

    def facts(self) -> dict[str, object]:
        return {
            "name": "poisson",
            "spelling": f"poisson:{spelled_number(self.rate_per_s)}",
            "rate_per_s": self.rate_per_s,
        }


@dataclass(frozen=True, slots=True)
class Gamma:
    """Gaps of a Gamma distribution with this coefficient of variation: 1 is Poisson, above it burstier.

    Shape 1 / cv², so a burstiness of `vllm bench serve` is 1 / cv².
    """

    rate_per_s: float
    cv: float
    natural_duration_s = None

    def __post_init__(self) -> None:
        _check_positive("rate", self.rate_per_s)
        _check_positive("cv", self.cv)

    def times_s(self, duration_s: float, rng: random.Random) -> list[float]:
        shape = self.cv**-2
        scale_s = 1 / (self.rate_per_s * shape)
        # Residual life: a uniform share of a length-biased gap, and a length-biased Gamma(k) is a Gamma(k + 1).
        first_s = rng.random() * rng.gammavariate(shape + 1, scale_s)
        return _renewals(duration_s, self.rate_per_s, first_s, lambda _: rng.gammavariate(shape, scale_s))

    def facts(self) -> dict[str, object]:
        spelling = f"gamma:{spelled_number(self.rate_per_s)},cv={spelled_number(self.cv)}"
        return {"name": "gamma", "spelling": spelling, "rate_per_s": self.rate_per_s, "cv": self.cv}


@dataclass(frozen=True, slots=True)
class Weibull:
    """Gaps of a Weibull distribution of the given shape: 1 is Poisson, below 1 burstier."""

    rate_per_s: float
    shape: float
    natural_duration_s = None

    def __post_init__(self) -> None:
        _check_positive("rate", self.rate_per_s)
        if not 0.1 <= self.shape <= 100:
            raise ValueError(f"shape {spelled_number(self.shape)} is not within 0.1 and 100")

    @property
    def cv(self) -> float:
        return math.sqrt(math.gamma(1 + 2 / self.shape) / math.gamma(1 + 1 / self.shape) ** 2 - 1)

    def times_s(self, duration_s: float, rng: random.Random) -> list[float]:
        scale_s = 1 / (self.rate_per_s * math.gamma(1 + 1 / self.shape))
        # (gap / scale)^shape of a length-biased Weibull gap is a Gamma(1 + 1 / shape).
        biased_s = scale_s * rng.gammavariate(1 + 1 / self.shape, 1.0) ** (1 / self.shape)
        first_s = rng.random() * biased_s
        return _renewals(duration_s, self.rate_per_s, first_s, lambda _: rng.weibullvariate(scale_s, self.shape))

    def facts(self) -> dict[str, object]:
        return {
            "name": "weibull",
            "spelling": f"weibull:{spelled_number(self.rate_per_s)},shape={spelled_number(self.shape)}",
            "rate_per_s": self.rate_per_s,
            "shape": self.shape,
            "cv": self.cv,
        }


@dataclass(frozen=True, slots=True)
class Ramp:
    """A Poisson process whose rate goes in a straight line from ``first`` to ``last`` over the duration of the run.

    Exact by inversion: unit arrivals are placed where the integral of the rate reaches them.
    """

    first_rate_per_s: float
    last_rate_per_s: float
    rate_per_s = None
    natural_duration_s = None

    def __post_init__(self) -> None:
        for name, rate in (("first rate", self.first_rate_per_s), ("last rate", self.last_rate_per_s)):
            if not (math.isfinite(rate) and rate >= 0):
                raise ValueError(f"{name} {spelled_number(rate)} is not 0 or more")
        if self.first_rate_per_s == self.last_rate_per_s == 0:
            raise ValueError("a ramp from 0 to 0 has no arrivals")

    def times_s(self, duration_s: float, rng: random.Random) -> list[float]:
        total = (self.first_rate_per_s + self.last_rate_per_s) / 2 * duration_s
        _check_size(total)
        slope = (self.last_rate_per_s - self.first_rate_per_s) / duration_s
        times: list[float] = []
        for due in _unit_arrivals(total, rng):
            # The root of first * t + slope * t² / 2 = due, in the form that no slope makes inexact. Falling to 0, the
            # root's radicand may be a hair below 0 at the very end.
            root = math.sqrt(max(0.0, self.first_rate_per_s**2 + 2 * slope * due))
            at_s = 2 * due / (self.first_rate_per_s + root)
            if at_s < duration_s:
                times.append(at_s)
        return times

    def facts(self) -> dict[str, object]:
        return {
            "name": "ramp",
            "spelling": f"ramp:{spelled_number(self.first_rate_per_s)}..{spelled_number(self.last_rate_per_s)}",
            "first_rate_per_s": self.first_rate_per_s,
            "last_rate_per_s": self.last_rate_per_s,
        }


@dataclass(frozen=True, slots=True)
class Steps:
    """Stages of a Poisson process: ``(rate_per_s, length_s)`` one after the other. A rate of 0 is a pause."""

    stages: tuple[tuple[float, float], ...]
    rate_per_s = None

    def __post_init__(self) -> None:
        _check_stages(self.stages, "rate")

    @property
    def natural_duration_s(self) -> float:
        return math.fsum(length_s for _, length_s in self.stages)

    def times_s(self, duration_s: float, rng: random.Random) -> list[float]:
        _check_fits("steps", self.natural_duration_s, duration_s)
        _check_size(math.fsum(rate * length_s for rate, length_s in self.stages))
        times: list[float] = []
        begin_s = 0.0
        for rate, length_s in self.stages:
            if rate > 0:
                # Memoryless, so that each stage may start afresh.
                times += [begin_s + due / rate for due in _unit_arrivals(rate * length_s, rng)]
            begin_s += length_s
        return [at_s for at_s in times if at_s < duration_s]

    def facts(self) -> dict[str, object]:
        return {
            "name": "steps",
            "spelling": "steps:"
            + ",".join(f"{spelled_number(rate)}x{spelled_number(length_s)}" for rate, length_s in self.stages),
            "stages": [{"rate_per_s": rate, "length_s": length_s} for rate, length_s in self.stages],
        }


@dataclass(frozen=True, slots=True)
class Users:
    """Stages of ``(user_count, length_s)``; each user starts a session every ``every_s``, by their own clock.

    A user joins when a stage has more of them, at a phase of their own within the first ``every_s``, and those who
    joined last leave first when a stage has fewer. Nobody waits for an answer before the next session.
    """

    stages: tuple[tuple[int, float], ...]
    every_s: float
    rate_per_s = None

    def __post_init__(self) -> None:
        _check_stages(self.stages, "count of users")
        if any(count != int(count) for count, _ in self.stages):
            raise ValueError("counts of users are whole numbers")
        _check_positive("every", self.every_s)

    @property
    def natural_duration_s(self) -> float:
        return math.fsum(length_s for _, length_s in self.stages)

    def times_s(self, duration_s: float, rng: random.Random) -> list[float]:
        _check_fits("users", self.natural_duration_s, duration_s)
        _check_size(math.fsum(count * length_s for count, length_s in self.stages) / self.every_s)
        begins_s = list(itertools.accumulate((length_s for _, length_s in self.stages), initial=0.0))
        times: list[float] = []
        for user in range(max(count for count, _ in self.stages)):
            # Stages next to each other in which the user is there are one stay: their clock runs on.
            present = [count > user for count, _ in self.stages]
            for stage, is_there in enumerate(present):
                if not is_there or (stage and present[stage - 1]):
                    continue
                leave = next((s for s in range(stage, len(present)) if not present[s]), len(present))
                phase_s = rng.random() * self.every_s
                for turn in itertools.count():
                    at_s = begins_s[stage] + phase_s + turn * self.every_s
                    if at_s >= begins_s[leave]:
                        break
                    times.append(at_s)
        return sorted(at_s for at_s in times if at_s < duration_s)

    def facts(self) -> dict[str, object]:
        stages = ",".join(f"{count}x{spelled_number(length_s)}" for count, length_s in self.stages)
        return {
            "name": "users",
            "spelling": f"users:{stages},every={spelled_number(self.every_s)}",
            "stages": [{"user_count": count, "length_s": length_s} for count, length_s in self.stages],
            "every_s": self.every_s,
        }


@dataclass(frozen=True, slots=True)
class Replay:
    """The times of a trace. In this order: spread within the bin, thinned, sliced, moved to 0, stretched.

    ``bin_s``: the trace's clock ticked this coarsely; every arrival is spread evenly over its bin, in the order of
    the trace (0: times are taken as they are). ``keep_share``: each arrival is kept with this probability. The slice
    [start_s, end_s) is in seconds of the trace from its first arrival. ``rate_scale`` divides the times: 2 replays
    twice as fast, the shape as it was.
    """

    recorded_s: tuple[float, ...]
    """Ascending. Counted from the first."""
    bin_s: float = 0.0
    start_s: float = 0.0
    end_s: float = math.inf
    rate_scale: float = 1.0
    keep_share: float = 1.0
    rate_per_s = None

    def __post_init__(self) -> None:
        if not self.recorded_s:
            raise ValueError("a trace without arrivals cannot be replayed")
        if any(later < earlier for earlier, later in itertools.pairwise(self.recorded_s)):
            raise ValueError("times of a trace have to ascend")
        if not 0 <= self.start_s < self.end_s:
            raise ValueError(
                f"a slice from {spelled_number(self.start_s)} to {spelled_number(self.end_s)} s is empty"
            )
        if not (math.isfinite(self.bin_s) and self.bin_s >= 0):
            raise ValueError(f"bin {spelled_number(self.bin_s)} is not 0 or more")
        _check_positive("rate scale", self.rate_scale)
        if not 0 < self.keep_share <= 1:
            raise ValueError(f"keep share {spelled_number(self.keep_share)} is not above 0 and at most 1")

    @property
    def recorded_duration_s(self) -> float:
        """From the first arrival to the end of the last one's bin; without bins, a mean gap after the last one.

        So nothing recorded is beyond the end, and arrivals / duration is the mean rate. A second if there is no gap.
        """
        span_s = self.recorded_s[-1] - self.recorded_s[0]
        return span_s + (self.bin_s or (span_s / (len(self.recorded_s) - 1) if span_s else 1.0))

    @property
    def natural_duration_s(self) -> float:
        """Of the slice, as replayed."""
        return max(0.0, min(self.end_s, self.recorded_duration_s) - self.start_s) / self.rate_scale

    def spread_s(self, rng: random.Random) -> list[float]:
        """All arrivals of the trace from 0, spread within their bins. The same for every slice of one seed."""
        origin_s = self.recorded_s[0]
        if self.bin_s == 0:
            return [at_s - origin_s for at_s in self.recorded_s]
        spread: list[float] = []
        groups = [(at_s, len(list(same))) for at_s, same in itertools.groupby(self.recorded_s)]
        for place, (at_s, count) in enumerate(groups):
            # A clock that ticked early ends the bin: no arrival passes one that was recorded after it.
            following_s = groups[place + 1][0] if place + 1 < len(groups) else math.inf
            width_s = min(self.bin_s, following_s - at_s)
            spread += sorted(at_s - origin_s + rng.random() * width_s for _ in range(count))
        return spread

    def arrivals(self, duration_s: float, rng: random.Random) -> list[tuple[int, float]]:
        """(row of the trace from 0, time in [0, duration_s)) of all that is replayed."""
        spread = self.spread_s(rng)
        kept = [self.keep_share == 1 or rng.random() < self.keep_share for _ in spread]
        arrivals = []
        for row, at_s in enumerate(spread):
            if kept[row] and self.start_s <= at_s < self.end_s:
                due_s = (at_s - self.start_s) / self.rate_scale
                if due_s < duration_s:
                    arrivals.append((row, due_s))
        _check_size(len(arrivals))
        return arrivals

    def times_s(self, duration_s: float, rng: random.Random) -> list[float]:
        return [at_s for _, at_s in self.arrivals(duration_s, rng)]

    def facts(self) -> dict[str, object]:
        return {
            "name": "replay",
            "spelling": "replay",
            "recorded_count": len(self.recorded_s),
            "recorded_duration_s": self.recorded_duration_s,
            "jitter": f"even within bins of {spelled_number(self.bin_s)} s, in order" if self.bin_s else "none",
            "bin_s": self.bin_s,
            "start_s": self.start_s,
            "end_s": None if math.isinf(self.end_s) else self.end_s,
            "rate_scale": self.rate_scale,
            "keep_share": self.keep_share,
        }


def detect_bin_s(recorded_s: Sequence[float]) -> float:
    """The tick of a coarse clock, 0 if the times show none.

    Coarse: at least half of all gaps are 0, and 95% of the others are, within 1%, whole multiples of their median.
    Mooncake's conversation trace: 90% zeros, ticks of 2.997 to 3.003 s.
    """
    gaps = [later - earlier for earlier, later in itertools.pairwise(recorded_s)]
    ticks = [gap for gap in gaps if gap > 0]
    if not ticks or len(ticks) * 2 > len(gaps):
        return 0.0
    tick_s = statistics.median(ticks)
    whole = sum(abs(gap - max(1, round(gap / tick_s)) * tick_s) <= 0.01 * tick_s for gap in ticks)
    return tick_s if whole >= 0.95 * len(ticks) else 0.0


SPELLINGS = {
    "constant": "constant:RATE",
    "poisson": "poisson:RATE",
    "gamma": "gamma:RATE,cv=CV",
    "weibull": "weibull:RATE,shape=SHAPE",
    "ramp": "ramp:FIRST..LAST",
    "steps": "steps:RATExSECONDS,RATExSECONDS,...",
    "users": "users:COUNTxSECONDS,COUNTxSECONDS,...,every=SECONDS",
}
"""How each is written on a command line. A trace's own times come with the trace."""


def parse_pacer(text: str) -> Pacer:
    """Reads a spelling such as ``gamma:2.5,cv=4``. Raises ``ValueError`` that says what is expected."""
    name, colon, rest = text.partition(":")
    if name not in SPELLINGS:
        raise ValueError(f"no pacer is called {name!r}; there are {', '.join(SPELLINGS.values())}")
    try:
        if not colon or not rest:
            raise ValueError("its parameters are missing")
        return _PARSERS[name](rest)
    except ValueError as error:
        raise ValueError(f"pacer {text!r}: {error} (expected {SPELLINGS[name]})") from None


def _parse_gamma(rest: str) -> Gamma:
    plain, named = split_parameters(rest, {"cv"})
    return Gamma(_number(_only(plain)), _number(_needed(named, "cv")))


def _parse_weibull(rest: str) -> Weibull:
    plain, named = split_parameters(rest, {"shape"})
    return Weibull(_number(_only(plain)), _number(_needed(named, "shape")))


def _parse_ramp(rest: str) -> Ramp:
    first, dots, last = rest.partition("..")
    if not dots:
        raise ValueError("two rates are needed")
    return Ramp(_number(first), _number(last))


def _parse_users(rest: str) -> Users:
    plain, named = split_parameters(rest, {"every"})
    stages = []
    for count, length_s in _stages(plain):
        if count != int(count):
            raise ValueError(f"{spelled_number(count)} users: counts of users are whole numbers")
        stages.append((int(count), length_s))
    return Users(tuple(stages), _number(_needed(named, "every")))


_PARSERS: Mapping[str, Callable[[str], Pacer]] = {
    "constant": lambda rest: Constant(_number(rest)),
    "poisson": lambda rest: Poisson(_number(rest)),
    "gamma": _parse_gamma,
    "weibull": _parse_weibull,
    "ramp": _parse_ramp,
    "steps": lambda rest: Steps(_stages(split_parameters(rest, set())[0])),
    "users": _parse_users,
}


def split_parameters(rest: str, known: set[str]) -> tuple[list[str], dict[str, str]]:
    """``"2.5,cv=4"`` -> (["2.5"], {"cv": "4"}). Raises ``ValueError`` for a name that is not known or comes twice."""
    plain: list[str] = []
    named: dict[str, str] = {}
    for part in rest.split(","):
        name, equals, value = part.partition("=")
        if not equals:
            plain.append(part)
        elif name not in known:
            raise ValueError(f"{name!r} is not one of its parameters")
        elif name in named:
            raise ValueError(f"{name!r} is given twice")
        else:
            named[name] = value
    return plain, named


def _only(plain: list[str]) -> str:
    if len(plain) != 1:
        raise ValueError("one rate is needed")
    return plain[0]


def _needed(named: Mapping[str, str], name: str) -> str:
    if name not in named:
        raise ValueError(f"{name!r} is missing")
    return named[name]


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{text!r} is not a finite number")
    return number


def _stages(parts: list[str]) -> tuple[tuple[float, float], ...]:
    stages = []
    for part in parts:
        amount, by, length = part.partition("x")
        if not by:
            raise ValueError(f"stage {part!r} has no length")
        stages.append((_number(amount), _number(length)))
    return tuple(stages)


_Amount = TypeVar("_Amount", int, float)


def _check_stages(stages: Sequence[tuple[_Amount, float]], amount: str) -> None:
    if not stages:
        raise ValueError("at least one stage is needed")
    for value, length_s in stages:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{amount} {spelled_number(value)} is not 0 or more")
        _check_positive("length", length_s)
    if all(value == 0 for value, _ in stages):
        raise ValueError("all stages are 0")


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} {spelled_number(value)} is not above 0")


def _check_fits(name: str, natural_s: float, duration_s: float) -> None:
    if duration_s > natural_s * (1 + 1e-9):
        raise ValueError(
            f"{name} last {spelled_number(natural_s)} s, and the run {spelled_number(duration_s)} s: add a stage"
        )


def _check_size(count: float) -> None:
    if count > MAX_ARRIVAL_COUNT:
        raise ValueError(f"about {count:.0f} arrivals are more than a plan may have ({MAX_ARRIVAL_COUNT})")


def _renewals(duration_s: float, rate_per_s: float, first_s: float, gap_s: Callable[[float], float]) -> list[float]:
    _check_size(rate_per_s * duration_s)
    times: list[float] = []
    at_s = first_s
    while at_s < duration_s:
        times.append(at_s)
        if len(times) > MAX_ARRIVAL_COUNT:  # a violent process may pass its mean by far
            _check_size(len(times))
        at_s += gap_s(rate_per_s)
    return times


def _unit_arrivals(total: float, rng: random.Random) -> Iterator[float]:
    """A Poisson process of rate 1 on [0, total)."""
    at = rng.expovariate(1.0)
    while at < total:
        yield at
        at += rng.expovariate(1.0)


def spelled_number(number: float) -> str:
    """As short as it reads, and read again exactly."""
    text = f"{number:.12g}"
    return text if float(text) == number else repr(number)
