"""Finds stop sequences in text that arrives in pieces, and never lets a part of one out.

Pure. The match that is complete first wins, and of several complete at the same character the longest: this is the
moment at which generation can end, and it does not depend on how the text was cut into pieces.

An Aho-Corasick automaton: its state after each character is the longest suffix of the text that begins a
sequence, and exactly that suffix is held back.

    text  ...The answ|er is 42.\\nUs     sequence "\\nUser:"
          sent       |sent     held ^^^ until the next character decides
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Match:
    """Text that may be sent, and the sequence found right behind it, if one was."""

    text: str = field(repr=False)
    sequence: str | None


class StopMatcher:
    """One answer's matcher. After a match it takes no more text."""

    def __init__(self, sequences: Sequence[str]) -> None:
        """``sequences``: each non-empty."""
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._found: list[str | None] = [None]
        self._fallback = [0]
        for sequence in sequences:
            self._add(sequence)
        self._link()
        self._state = 0
        self._held = ""

    def push(self, text: str, *, is_minded: bool = True) -> Match:
        """Takes the next text; returns what may be sent now and the match, if complete. ``is_minded`` False: a match
        complete within ``text`` is none; one that only begins there may still become one."""
        pending = self._held + text
        start = len(self._held)
        for position, char in enumerate(text, start=start):
            self._step(char)
            found = self._found[self._state]
            if found is not None and is_minded:
                self._held = ""
                return Match(pending[: position + 1 - len(found)], found)
        sent_count = len(pending) - self._depth[self._state]
        self._held = pending[sent_count:]
        return Match(pending[:sent_count], None)

    def flush(self) -> str:
        """Text held back, which no sequence claims any more. The text is over."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _step(self, char: str) -> None:
        while char not in self._next[self._state] and self._state:
            self._state = self._fallback[self._state]
        self._state = self._next[self._state].get(char, 0)

    def _add(self, sequence: str) -> None:
        state = 0
        for char in sequence:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._found.append(None)
                self._fallback.append(0)
            state = self._next[state][char]
        self._found[state] = sequence

    def _link(self) -> None:
        """Breadth first, so that every fallback, being shallower, is final when it is followed."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for char, child in self._next[state].items():
                fallback = self._fallback[state]
                while char not in self._next[fallback] and fallback:
                    fallback = self._fallback[fallback]
                self._fallback[child] = self._next[fallback].get(char, 0)
                if self._found[child] is None:  # the longest wins: one's own before the fallback's
                    self._found[child] = self._found[self._fallback[child]]
                queue.append(child)
