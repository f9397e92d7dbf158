"""Turns a TOML table into a frozen dataclass: names and types are checked here, ranges by the dataclass itself.

It knows nothing of Baton. The dataclass is the only description of what a table may hold; a key it does not
have is refused by name, with the nearest one it does have.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """The configuration cannot be used. The message names the key, what is wrong and what to do."""


def key_path(where: str, key: str) -> str:
    """``prefill.engine`` and ``dtype`` to ``prefill.engine.dtype``, the way one would grep for it."""
    return f"{where}.{key}" if where else key


def refuse_unknown_keys(table: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raises ``ConfigError`` naming every key of ``table`` that is not in ``known``."""
    unknown = [key for key in table if key not in known]
    if not unknown:
        return
    said = []
    for key in unknown:
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known here: {', '.join(sorted(known))}"
        said.append(f"unknown key {key_path(where, key)!r}: {hint}")
    raise ConfigError("; ".join(said))


def build(
    cls: type[T],
    table: Mapping[str, Any],
    where: str = "",
    *,
    given: Mapping[str, Any] | None = None,
    given_from: Mapping[str, str] | None = None,
) -> T:
    """An instance of the dataclass ``cls`` from ``table``.

    ``given`` holds fields that do not come from this table; ``given_from`` says, per such field, where its
    value does come from, which is what a table that sets one is told. Raises ``ConfigError``.
    """
    given = given or {}
    origin = given_from or {}
    for key in table:
        if key in given or key in origin:
            raise ConfigError(f"{key_path(where, key)} cannot be set here: {origin.get(key, 'it is computed')}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    refuse_unknown_keys(table, [name for name in fields if name not in given], where)
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = dict(given)
    for key, value in table.items():
        values[key] = _convert(hints[key], value, key_path(where, key))
    for name, f in fields.items():
        has_default = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        if name not in values and not has_default:
            raise ConfigError(f"{key_path(where, name)} is required and missing")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(_prefixed(where, str(error))) from None
    except (ValueError, TypeError) as error:
        raise ConfigError(_prefixed(where, str(error))) from error


def _prefixed(where: str, message: str) -> str:
    return f"{where}.{message}" if where else message


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} must be a table ([{path}]), not {_said(value)}")
        return build(hint, value, path)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        allowed = [str(member.value) for member in hint]
        if value not in allowed:
            raise ConfigError(f"{path} must be one of {', '.join(allowed)}, not {_said(value)}")
        return hint(value)
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(f"{path} must be one of {', '.join(map(repr, arguments))}, not {_said(value)}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None  # TOML has no word for it; a worker's configuration on its way to its process has
        inner = [argument for argument in arguments if argument is not type(None)]
        if len(inner) == 1:
            return _convert(inner[0], value, path)
        for argument in inner:
            try:
                return _convert(argument, value, path)
            except ConfigError:
                continue
        raise ConfigError(f"{path} has the wrong type: {_said(value)}")
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{path} must be a list, not {_said(value)}")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_convert(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
        if len(arguments) != len(value):
            raise ConfigError(f"{path} must have {len(arguments)} items, not {len(value)}")
        return tuple(
            _convert(a, item, f"{path}[{i}]") for i, (a, item) in enumerate(zip(arguments, value, strict=True))
        )
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} must be a table ([{path}]), not {_said(value)}")
        item_hint = arguments[1] if len(arguments) == 2 else Any
        return {str(key): _convert(item_hint, item, key_path(path, str(key))) for key, item in value.items()}
    if hint is Any or hint is object:
        return value
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{path} must be a number, not {_said(value)}")
        return float(value)
    if hint is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{path} must be a whole number, not {_said(value)}")
        return value
    if hint is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{path} must be true or false, not {_said(value)}")
        return value
    if hint is str:
        if not isinstance(value, str):
            raise ConfigError(f"{path} must be a string, not {_said(value)}")
        return value
    raise ConfigError(f"{path} cannot be set from a file (its type is {hint!r})")


def _said(value: Any) -> str:
    kinds = {
        bool: "a boolean",
        int: "a whole number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "a table",
    }
    return f"{kinds.get(type(value), type(value).__name__)} ({value!r})"
