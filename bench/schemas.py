"""JSON schemas to hold answers to: made from a number, and bounded, so that a small model comes to their end.

Pure. Every schema has an end: no recursion, lists, texts and numbers with bounds. ``FEATURES`` are single keywords,
each in a schema of its own: which of them the engine follows and which it refuses is for the soak to say.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]
MAX_DEPTH = 3
_WORDS = ("name", "city", "kind", "size", "colour", "age", "tags", "place", "count", "note", "id", "is_new")
_PATTERNS = ("[a-z]{2,8}", "[A-Z][a-z]{1,6}", "[0-9]{2}-[0-9]{2}", "(red|green|blue)", "v[0-9]\\.[0-9]")
_FORMATS = ("date", "ipv4", "uuid")
"""Those whose texts have an end. A fraction of a second, a mailbox or an address may go on for ever, and a small
model does go on: such formats are asked one by one, in ``FEATURES``, as a question of their own."""


def schema_of(number: int, seed: int) -> Schema:
    """An object schema; equal numbers and seeds give equal schemas."""
    rng = random.Random(f"{seed}/{number}")  # noqa: S311  # reproducible on purpose
    maker = _Maker(rng)
    schema = maker.object(0)
    if maker.definitions:
        schema["$defs"] = maker.definitions
    return schema


class _Maker:
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.definitions: dict[str, Schema] = {}

    def object(self, depth: int) -> Schema:
        rng = self._rng
        names = rng.sample(_WORDS, rng.randint(1, 4 if depth == 0 else 2))
        required = [name for name in names if rng.random() < 0.8] or names[:1]
        return {
            "type": "object",
            "properties": {name: self.value(depth + 1) for name in names},
            "required": required,
            "additionalProperties": False,
        }

    def value(self, depth: int) -> Schema:
        rng = self._rng
        leaves: list[Callable[[], Schema]] = [
            self._text, self._text, self._pattern, self._format, self._integer, self._number, self._enum, self._const,
            self._boolean, self._nullable,
        ]  # fmt: skip
        branches: list[Callable[[], Schema]] = [
            lambda: self.object(depth),
            lambda: self._array(depth),
            lambda: self._any_of(depth),
            lambda: self._reference(depth),
        ]
        return rng.choice(leaves if depth >= MAX_DEPTH or rng.random() < 0.55 else branches)()

    def _text(self) -> Schema:
        least = self._rng.randint(0, 3)
        return {"type": "string", "minLength": least, "maxLength": least + self._rng.randint(1, 10)}

    def _pattern(self) -> Schema:
        return {"type": "string", "pattern": f"^{self._rng.choice(_PATTERNS)}$"}

    def _format(self) -> Schema:
        return {"type": "string", "format": self._rng.choice(_FORMATS)}

    def _integer(self) -> Schema:
        least = self._rng.choice((-100, 0, 1, 10))
        return {"type": "integer", "minimum": least, "maximum": least + self._rng.choice((1, 9, 1000))}

    def _number(self) -> Schema:
        return {"type": "number", "minimum": 0, "exclusiveMaximum": self._rng.choice((1, 2.5, 100))}

    def _enum(self) -> Schema:
        return {"enum": self._rng.choice((["yes", "no"], ["a", "b", "c"], [1, 2, 3], ["none", None, 0, True]))}

    def _const(self) -> Schema:
        return {"const": self._rng.choice(("fixed", 7, None, True, ["a", 1], {"k": "v"}))}

    def _boolean(self) -> Schema:
        return {"type": "boolean"}

    def _nullable(self) -> Schema:
        return {"type": ["integer", "null"], "minimum": 0, "maximum": 99}

    def _array(self, depth: int) -> Schema:
        least = self._rng.randint(0, 2)
        return {
            "type": "array",
            "items": self.value(depth + 1),
            "minItems": least,
            "maxItems": least + self._rng.randint(0, 2),
        }

    def _any_of(self, depth: int) -> Schema:
        if self._rng.random() < 0.5:
            return {"anyOf": [self.value(depth + 1), {"type": "null"}]}
        return {"oneOf": [{"type": "boolean"}, {"type": "integer", "minimum": 0, "maximum": 9}]}

    def _reference(self, depth: int) -> Schema:
        name = f"part{len(self.definitions)}"
        self.definitions[name] = {}  # its place, so that what is inside gets another name
        self.definitions[name] = self.value(depth + 1)
        return {"$ref": f"#/$defs/{name}"}


_TEXT: Schema = {"type": "string", "maxLength": 5}
_SMALL: Schema = {"type": "integer", "minimum": 0, "maximum": 50}


def _of(**keywords: Any) -> Schema:
    return {"type": "object", "properties": {"a": keywords}, "required": ["a"], "additionalProperties": False}


FEATURES: dict[str, Schema] = {
    "allOf": _of(allOf=[{"type": "integer", "minimum": 3}, {"maximum": 5}]),
    "oneOf that overlaps": _of(oneOf=[{"type": "integer", "maximum": 5}, {"type": "integer", "minimum": 3}]),
    "not": _of(type="integer", minimum=0, maximum=3, **{"not": {"const": 1}}),
    "if, then, else": {
        **_of(type="boolean"), "if": {"properties": {"a": {"const": True}}}, "then": {"minProperties": 1}},
    "multipleOf": _of(type="integer", minimum=0, maximum=50, multipleOf=5),
    "uniqueItems": _of(type="array", items={"enum": [1, 2, 3]}, minItems=2, maxItems=3, uniqueItems=True),
    "contains": _of(type="array", items=_SMALL, contains={"const": 7}, minItems=1, maxItems=2),
    "prefixItems": _of(type="array", prefixItems=[_SMALL, _TEXT], items=False, minItems=2),
    "patternProperties": _of(
        type="object", patternProperties={"^x": _SMALL}, additionalProperties=False, maxProperties=2),
    "propertyNames": _of(type="object", propertyNames={"maxLength": 3}, additionalProperties=_SMALL),
    "minProperties": _of(
        type="object", properties={"b": _SMALL, "c": _SMALL}, minProperties=2, additionalProperties=False),
    "dependentRequired": _of(
        type="object", properties={"b": _SMALL, "c": _SMALL}, dependentRequired={"b": ["c"]},
        additionalProperties=False),
    "additionalProperties of a kind": _of(type="object", additionalProperties=_SMALL, maxProperties=2),
    "unevaluatedProperties": {**_of(**_SMALL), "unevaluatedProperties": False},
    "a remote $ref": _of(**{"$ref": "https://example.com/schema.json"}),
    "a $ref to nothing": _of(**{"$ref": "#/$defs/nowhere"}),
    "an unknown format": _of(type="string", format="colour", maxLength=5),
    "an unknown type": _of(type="colour"),
    "format hostname": _of(type="string", format="hostname"),
    "format uri": _of(type="string", format="uri"),
    "format time": _of(type="string", format="time"),
    "format date-time": _of(type="string", format="date-time"),
    "format email": _of(type="string", format="email"),
    "format duration": _of(type="string", format="duration"),
    "a pattern with look-ahead": _of(type="string", pattern="^(?=a)[a-z]{2,4}$"),
    "a pattern with a back reference": _of(type="string", pattern="^([ab])\\1$"),
    "a bound that contradicts": _of(type="integer", minimum=5, maximum=1),
    "false": _of(**{"not": {}}),
}  # fmt: skip
"""One keyword or case each."""
