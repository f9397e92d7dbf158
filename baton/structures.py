"""What a structure must be before an engine compiles it. Pure, and fast whatever the text.

An engine's grammar compiler is native code that recurses and expands: a text of a few bytes can exhaust its stack or
keep it busy for hours, and with it every request of the engine. So nesting and repetition are bounded here, by
reading the text once. Whether it *is* a schema, an expression or a grammar is the compiler's to say.
"""

from __future__ import annotations

import json
import re

from baton.request import MAX_CHOICE_COUNT, MAX_STRUCTURE_BYTES, Structure, StructureKind

MAX_NESTING = 32
MAX_CHECK_S = 1.0
"""Longest time that an engine's grammar compiler may take to read one."""
MAX_REPETITION_COUNT = 1024
MAX_EXPANDED_SIZE = MAX_STRUCTURE_BYTES

MAX_COUNT = 10_000
"""Of items, properties or characters that a schema asks for."""

_COUNT_KEYS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
_REPEAT = re.compile(r"\{(\d*)(?:,(\d*))?\}")


def structure_problem(structure: Structure) -> str | None:
    """What is wrong with it, or None."""
    if structure.kind is StructureKind.CHOICE:
        return _choice_problem(structure)
    if structure.choices:
        return "has choices, which only a choice has"
    if structure.kind is StructureKind.JSON_OBJECT:
        return "of any JSON object has no text" if structure.text else None
    if not structure.text.strip():
        return "is empty"
    if (size := len(structure.text.encode())) > MAX_STRUCTURE_BYTES:
        return f"has {size} bytes"
    if "\0" in structure.text:
        return "has a NUL character"
    if structure.kind is StructureKind.JSON_SCHEMA:
        return _schema_problem(structure.text)
    return expansion_problem(structure.text)


def _choice_problem(structure: Structure) -> str | None:
    if structure.text:
        return "of choices has no text"
    if not 1 <= len(structure.choices) <= MAX_CHOICE_COUNT:
        return f"has {len(structure.choices)} choices"
    if not all(structure.choices):
        return "has an empty choice"
    if (size := sum(len(choice.encode()) for choice in structure.choices)) > MAX_STRUCTURE_BYTES:
        return f"has {size} bytes"
    return None


def _schema_problem(text: str) -> str | None:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        return "is not JSON"
    if not isinstance(schema, dict):
        return "is not a JSON object"
    parts: list[object] = [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            parts += part.values()
            counts = [part[key] for key in _COUNT_KEYS if isinstance(part.get(key), int | float)]
            if not all(0 <= count <= MAX_COUNT for count in counts):
                return f"counts to more than {MAX_COUNT}"
        elif isinstance(part, list):
            parts += part
    return None


def expansion_problem(text: str) -> str | None:
    """Of an expression or a grammar: brackets too deep, or repeats that multiply to too much."""
    sizes = [0]  # of the open groups, innermost last, in characters with every repeat written out
    last = 0  # of what a repeat would repeat
    at = 0
    while at < len(text):
        char = text[at]
        repeat = _REPEAT.match(text, at) if char == "{" else None
        if char == "\\":
            at, last = at + 2, 1
            sizes[-1] += last
        elif repeat is not None:
            count = max([int(each) for each in repeat.groups() if each] or [1]) if len(repeat[0]) < 12 else None
            if count is None or count > MAX_REPETITION_COUNT:
                return f"repeats more than {MAX_REPETITION_COUNT} times"
            sizes[-1] += last * max(0, count - 1)
            at, last = repeat.end(), last * max(1, count)
        elif char in "([":
            if len(sizes) > MAX_NESTING:
                return f"nests more than {MAX_NESTING} brackets"
            sizes.append(0)
            at, last = at + 1, 0
        elif char in ")]" and len(sizes) > 1:
            last = max(1, sizes.pop())
            sizes[-1] += last
            at += 1
        else:
            at, last = at + 1, 1
            sizes[-1] += last
        if sizes[-1] > MAX_EXPANDED_SIZE:
            return f"is, with its repeats written out, longer than {MAX_EXPANDED_SIZE} characters"
    return None
