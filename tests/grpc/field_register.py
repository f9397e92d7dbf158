"""Every field of the public API, by the descriptors, and which of them a test shows.

A helper of the conformance tests. A field is named ``Message.field``; the fields of a message count once, wherever it
is used. Durations are one value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from raw_calls import METHODS

Shown = TypeVar("Shown", bound=Callable[..., Any])


def fields_of(descriptor: Any, known: set[str] | None = None) -> Iterator[str]:
    """Of a message and of all messages in it."""
    known = set() if known is None else known
    if descriptor.full_name in known or not descriptor.full_name.startswith("baton."):
        return
    known.add(descriptor.full_name)
    for field in descriptor.fields:
        yield f"{descriptor.name}.{field.name}"
        if field.message_type is not None:
            yield from fields_of(field.message_type, known)


def request_fields() -> set[str]:
    return {name for method in METHODS.values() for name in fields_of(method.input_type)}


def response_fields() -> set[str]:
    return {name for method in METHODS.values() for name in fields_of(method.output_type)}


class Register:
    """Which test shows which field. ``shows`` marks a test; ``add`` is for tables of parametrised ones."""

    def __init__(self) -> None:
        self.tests: dict[str, list[str]] = {}

    def add(self, field: str, test: str) -> None:
        self.tests.setdefault(field, []).append(test)

    def shows(self, *fields: str) -> Callable[[Shown], Shown]:
        def mark(test: Shown) -> Shown:
            for field in fields:
                self.add(field, test.__name__)
            return test

        return mark

    def compare(self, wanted: set[str]) -> tuple[list[str], list[str]]:
        """(fields that no test shows, names that are no field)."""
        return sorted(wanted - set(self.tests)), sorted(set(self.tests) - wanted)
