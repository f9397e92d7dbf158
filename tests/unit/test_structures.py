"""What a structure must be: bounded, whatever its text, and read in no time."""

from __future__ import annotations

import json

import pytest

from baton.request import Structure, StructureKind
from baton.structures import MAX_COUNT, MAX_NESTING, structure_problem

REGEX, GRAMMAR, SCHEMA = StructureKind.REGEX, StructureKind.GRAMMAR, StructureKind.JSON_SCHEMA

GOOD = [
    Structure(StructureKind.JSON_OBJECT),
    Structure(StructureKind.CHOICE, choices=("yes", "no")),
    Structure(REGEX, r"[a-z]+ \\(\d{3,4}\) \{ [(\[] x{0,}"),
    Structure(REGEX, "(" * MAX_NESTING + "a" + ")" * MAX_NESTING),
    Structure(REGEX, "(ab{1024}){32}"),
    Structure(GRAMMAR, 'root ::= "(" item ")" | "{"\nitem ::= [0-9]{3}'),
    Structure(SCHEMA, json.dumps({"type": "array", "maxItems": MAX_COUNT, "items": {"maxLength": 0}})),
]

BAD = {
    "text beside choices": Structure(StructureKind.CHOICE, "a", ("a",)),
    "no choice": Structure(StructureKind.CHOICE),
    "an empty choice": Structure(StructureKind.CHOICE, choices=("a", "")),
    "too many choices": Structure(StructureKind.CHOICE, choices=("a",) * 257),
    "long choices": Structure(StructureKind.CHOICE, choices=("a" * 40_000, "b" * 40_000)),
    "choices beside text": Structure(REGEX, "a", ("a",)),
    "text of any object": Structure(StructureKind.JSON_OBJECT, "{}"),
    "nothing": Structure(REGEX, " "),
    "a long text": Structure(GRAMMAR, "a" * 70_000),
    "a NUL": Structure(REGEX, "a\0"),
    "no JSON": Structure(SCHEMA, "{"),
    "JSON too deep to read": Structure(SCHEMA, "[" * 60_000),
    "JSON that is no object": Structure(SCHEMA, "[]"),
    "a count too large": Structure(SCHEMA, json.dumps({"items": [{"minItems": MAX_COUNT + 1}]})),
    "a count that is none": Structure(SCHEMA, '{"maxLength": NaN}'),
    "brackets too deep": Structure(REGEX, "(" * (MAX_NESTING + 1)),
    "a repeat too long": Structure(REGEX, "a{1025}"),
    "a repeat of a number too long": Structure(REGEX, "a{99999999999}"),
    "repeats that multiply": Structure(REGEX, "((a{100}){100}){100}"),
    "repeats that multiply in one rule": Structure(GRAMMAR, 'root ::= ("ab" [a-z]{1,1000} "c"){1000}'),
}


@pytest.mark.parametrize("structure", GOOD, ids=lambda each: each.kind.value)
def test_a_structure_within_its_bounds_has_no_problem(structure: Structure) -> None:
    assert structure_problem(structure) is None


@pytest.mark.parametrize("name", BAD)
def test_a_structure_beyond_a_bound_is_told_so(name: str) -> None:
    problem = structure_problem(BAD[name])
    assert problem
    assert "aaaa" not in problem


def test_the_longest_texts_are_read_once() -> None:
    """What reads them again and again takes hours, and the limit of every test, five minutes, ends it."""
    for text in ("{" * 65_536, "a{1}" * 16_384, "(a)" * 21_845, "\\\\" * 32_768):
        structure_problem(Structure(REGEX, text))
