"""The calibrated profile of a machine: what a simulator must know to predict latencies, and how well it is known.

Owns the shape of the file (TOML, schema 1), its reading and its writing. Pure but for the file itself. Without a
file, ``Profile()`` is the defaults of ``engine/cost.py`` and no overhead, contention or noise at all.
"""

from __future__ import annotations

import json
import math
import tomllib
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from engine.cost import CostModel, DecodeCost, Link, PrefillCost

__all__ = ["Contention", "FitError", "Line", "Noise", "Overheads", "Profile", "ProfileError"]

SCHEMA = 1
KINDS = ("prefill", "decode", "mixed")
"""Of steps: prompt chunks alone, decoding sequences alone, both."""


class ProfileError(ValueError):
    """The file is no profile that this version reads. Says which key, and what to do."""


def _refuse_negative(line: Any) -> None:
    for each in fields(line):
        if not getattr(line, each.name) >= 0:
            raise ValueError(f"{type(line).__name__}.{each.name} must be 0 or more, got {getattr(line, each.name)}")


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds = ``base_s`` + ``per_unit_s`` * units; which units, says whoever has the line."""

    base_s: float = 0.0
    per_unit_s: float = 0.0

    def __post_init__(self) -> None:
        _refuse_negative(self)

    def at(self, unit_count: float) -> float:
        return self.base_s + self.per_unit_s * unit_count


@dataclass(frozen=True, slots=True)
class Overheads:
    """What a request waits for beside steps and pulls, all in seconds, measured with nothing else in the way."""

    admit: Line = Line()
    """From the caller's sending to the engine's queue; a unit is a token of prompt. Router, gRPC, worker."""
    first_token: Line = Line()
    """From the end of the step that completed a prompt to its token at the caller."""
    token: Line = Line()
    """From the end of a decode step to a token of it at its caller, on the mean; a unit is a sequence of the step."""
    handoff: Line = Line()
    """From the end of the step that completed a prompt until the decode engine has the request in its queue, the
    pull not begun; a unit is a token of prompt. Ledger, ticket, router, gRPC twice."""
    pulled_step: Line = Line()
    """Beside the pull itself, what a step takes longer that pulled; a unit is a pull."""


@dataclass(frozen=True, slots=True)
class Contention:
    """The share of its speed that an engine loses while its neighbour on the same machine is in a step: a step whose
    work is W alone takes W = T - share * overlap. 0: nothing; must be below 1."""

    prefill_by_prefill: float = 0.0
    prefill_by_decode: float = 0.0
    decode_by_prefill: float = 0.0
    decode_by_decode: float = 0.0

    def __post_init__(self) -> None:
        _refuse_negative(self)
        for each in fields(self):
            if not getattr(self, each.name) < 1:
                raise ValueError(f"Contention.{each.name} must be below 1, got {getattr(self, each.name)}")

    def share(self, *, is_prefill: bool, neighbour_is_prefill: bool) -> float:
        """A step with any prompt chunk counts as prefill."""
        table = {
            (True, True): self.prefill_by_prefill,
            (True, False): self.prefill_by_decode,
            (False, True): self.decode_by_prefill,
            (False, False): self.decode_by_decode,
        }
        return table[is_prefill, neighbour_is_prefill]


@dataclass(frozen=True, slots=True)
class Noise:
    """Measured over predicted time of single steps, as an empirical distribution: ``values`` at ``shares``, 0 to 1,
    both ascending. Drawn by ``at(u)`` with u uniform in [0, 1). Empty: always 1."""

    shares: tuple[float, ...] = ()
    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.shares) != len(self.values) or len(self.shares) == 1:
            raise ValueError("Noise: as many shares as values, none or two at least")
        if list(self.shares) != sorted(self.shares) or list(self.values) != sorted(self.values):
            raise ValueError("Noise: shares and values must be ascending")
        if self.values and not self.values[0] >= 0:
            raise ValueError("Noise: ratios of times are 0 or more")

    def at(self, share: float) -> float:
        """The ratio at a quantile, between the known ones in a line and beyond them the nearest."""
        if not self.shares:
            return 1.0
        above = bisect_right(self.shares, share)
        if above == 0:
            return self.values[0]
        if above == len(self.shares):
            return self.values[-1]
        low, high = self.shares[above - 1], self.shares[above]
        part = (share - low) / (high - low)
        return self.values[above - 1] + part * (self.values[above] - self.values[above - 1])


@dataclass(frozen=True, slots=True)
class FitError:
    """On steps that the fit has not seen."""

    sample_count: int
    """Seen and unseen."""
    mape: float
    """Mean of |predicted - measured| / measured."""
    bias: float
    """Sum of predicted over sum of measured, less 1: what a long run is off by."""
    worst: float
    """The largest |predicted - measured| / measured."""
    r_squared: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Costs by role ("prefill", "decode"), and all that makes real latencies differ from steps."""

    costs: Mapping[str, CostModel] = field(default_factory=lambda: {"prefill": CostModel(), "decode": CostModel()})
    link: Link = Link()
    overheads: Overheads = Overheads()
    contention: Contention = Contention()
    noise: Mapping[str, Noise] = field(default_factory=lambda: {kind: Noise() for kind in KINDS})
    """By kind of step."""
    overhead_noise: Mapping[str, Noise] = field(default_factory=dict)
    """By field of ``Overheads``, where measured."""
    fit: Mapping[str, FitError] = field(default_factory=dict)
    """By what was fitted."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Machine, versions, model, limits of the engines, date, seed, commit, counts."""

    def __post_init__(self) -> None:
        if set(self.costs) != {"prefill", "decode"}:
            raise ValueError("Profile.costs: needs 'prefill' and 'decode'")
        if not set(self.noise) <= set(KINDS):
            raise ValueError(f"Profile.noise: by kind of step, of {', '.join(KINDS)}")


def read_profile(path: str | Path) -> Profile:
    """Raises ``ProfileError``; ``OSError`` where there is no such file."""
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path}: not TOML: {error}") from error
    try:
        return _profile(table)
    except ValueError as error:
        raise ProfileError(f"{path}: {error}") from error


def write_profile(path: str | Path, profile: Profile) -> None:
    """Overwrites ``path`` at the end of writing, not before."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.new")
    draft.write_text(to_toml(profile), encoding="utf-8")
    draft.replace(target)


def to_toml(profile: Profile) -> str:
    table = {
        "schema": SCHEMA,
        "costs": {role: asdict(cost) for role, cost in profile.costs.items()},
        "link": asdict(profile.link),
        "overheads": asdict(profile.overheads),
        "contention": asdict(profile.contention),
        "noise": {kind: asdict(noise) for kind, noise in profile.noise.items()},
        "overhead_noise": {name: asdict(noise) for name, noise in profile.overhead_noise.items()},
        "fit": {name: asdict(error) for name, error in profile.fit.items()},
        "provenance": dict(profile.provenance),
    }
    return "# Made by `baton bench calibrate`; the keys are explained in docs/workbench/calibration.md.\n" + _toml(
        table
    )


def _profile(table: Mapping[str, Any]) -> Profile:
    schema = table.get("schema")
    if schema != SCHEMA:
        raise ProfileError(f"schema: is {schema!r}, this version reads {SCHEMA}; calibrate again")
    known = {each.name for each in fields(Profile)} | {"schema"}
    for key in table:
        if key not in known:
            raise ProfileError(f"{key}: is not known; known here: {', '.join(sorted(known))}")
    overheads = _sub_table(table, "overheads")
    _refuse_unknown("overheads", overheads, Overheads)
    return Profile(
        costs={role: _cost(f"costs.{role}", cost) for role, cost in _sub_table(table, "costs").items()},
        link=_made("link", _sub_table(table, "link"), Link),
        overheads=Overheads(**{key: _made(f"overheads.{key}", value, Line) for key, value in overheads.items()}),
        contention=_made("contention", _sub_table(table, "contention"), Contention),
        noise={kind: _noise(f"noise.{kind}", value) for kind, value in _sub_table(table, "noise").items()},
        overhead_noise={
            name: _noise(f"overhead_noise.{name}", value) for name, value in table.get("overhead_noise", {}).items()
        },
        fit={name: _made(f"fit.{name}", value, FitError) for name, value in table.get("fit", {}).items()},
        provenance=_sub_table(table, "provenance"),
    )


def _sub_table(table: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = table.get(key)
    if not isinstance(value, dict):
        raise ProfileError(f"{key}: is missing or no table; calibrate again")
    return value


def _cost(name: str, value: Any) -> CostModel:
    if not isinstance(value, dict):
        raise ProfileError(f"{name}: is no table")
    nested = {"prefill": PrefillCost, "decode": DecodeCost}
    parts: dict[str, Any] = {
        key: _made(f"{name}.{key}", each, nested[key]) if key in nested else each for key, each in value.items()
    }
    return _built(name, parts, CostModel)  # type: ignore[no-any-return]


def _noise(name: str, value: Any) -> Noise:
    if not isinstance(value, dict):
        raise ProfileError(f"{name}: is no table")
    _refuse_unknown(name, value, Noise)
    lists: dict[str, tuple[float, ...]] = {}
    for key, each in value.items():
        if not isinstance(each, list) or not all(_is_number(item) for item in each):
            raise ProfileError(f"{name}.{key}: is no list of numbers")
        lists[key] = tuple(float(item) for item in each)
    return Noise(**lists)


def _made(name: str, value: Any, kind: type[Any]) -> Any:
    """A dataclass of numbers."""
    if not isinstance(value, dict):
        raise ProfileError(f"{name}: is no table")
    for key, each in value.items():
        if not _is_number(each):
            raise ProfileError(f"{name}.{key}: is no number")
    return _built(name, value, kind)


def _built(name: str, value: dict[str, Any], kind: type[Any]) -> Any:
    _refuse_unknown(name, value, kind)
    try:
        return kind(**value)
    except TypeError as error:
        missing = [each.name for each in fields(kind) if each.name not in value]
        raise ProfileError(f"{name}: lacks one of {', '.join(missing)}, or has a value of a wrong type") from error


def _refuse_unknown(name: str, table: Mapping[str, Any], kind: type[Any]) -> None:
    known = [each.name for each in fields(kind)]
    for key in table:
        if key not in known:
            raise ProfileError(f"{name}.{key}: is not known; known here: {', '.join(known)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _toml(table: Mapping[str, Any], path: tuple[str, ...] = ()) -> str:
    """As much of TOML as a profile needs: tables, and lists of plain values. ``None`` has no word there and is left
    out."""
    plain = {key: value for key, value in table.items() if value is not None and not isinstance(value, Mapping)}
    lines = [f"{_key(key)} = {_value(value)}" for key, value in plain.items()]
    if path and (lines or not table):
        lines.insert(0, "[" + ".".join(map(_key, path)) + "]")
    text = "\n".join(lines) + "\n" if lines else ""
    for key, value in table.items():
        if isinstance(value, Mapping):
            text += ("\n" if text else "") + _toml(value, (*path, key))
    return text


def _key(key: str) -> str:
    return key if key.replace("_", "a").replace("-", "a").isalnum() and key.isascii() else json.dumps(key)


def _value(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float():
            return repr(float(f"{value:.6g}"))
        case str():
            return json.dumps(value, ensure_ascii=False)  # TOML's basic strings are JSON's
        case list() | tuple():
            return "[" + ", ".join(_value(each) for each in value) + "]"
    raise ProfileError(f"a profile cannot hold a {type(value).__name__}")
