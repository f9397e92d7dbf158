"""Prompts of exact token length made of real English: the standard library's own docstrings.

Random tokens make flat distributions, where greedy decoding turns on rounding; prose does not. The text is
whatever this Python ships, so prompts differ between Python versions but not between two runs of one.
"""

from __future__ import annotations

import importlib
import inspect
import random
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

MODULES = (
    "argparse", "asyncio.tasks", "asyncio.streams", "collections", "configparser", "contextlib", "csv",
    "dataclasses", "datetime", "decimal", "difflib", "doctest", "email.message", "enum", "fractions",
    "functools", "heapq", "inspect", "ipaddress", "json", "logging", "mailbox", "optparse", "os", "pathlib",
    "pickletools", "random", "re", "sched", "shutil", "socket", "statistics", "string", "subprocess", "tarfile",
    "tempfile", "textwrap", "threading", "tokenize", "turtle", "typing", "unittest.case", "unittest.mock",
    "urllib.parse", "uuid", "zipfile",
)  # fmt: skip


def prose() -> str:
    """All docstrings of ``MODULES``, in a fixed order; about a million characters."""
    pieces: list[str] = []
    for name in MODULES:
        module = importlib.import_module(name)
        pieces.append(inspect.getdoc(module) or "")
        for _, member in sorted(vars(module).items(), key=lambda item: item[0]):
            if not (inspect.isclass(member) or inspect.isfunction(member)):
                continue
            pieces.append(inspect.getdoc(member) or "")
            if inspect.isclass(member):
                pieces.extend(
                    inspect.getdoc(inner) or ""
                    for _, inner in sorted(vars(member).items(), key=lambda item: item[0])
                    if inspect.isfunction(inner)
                )
    return "\n\n".join(piece for piece in pieces if len(piece) > 80)


class Corpus:
    """Token windows of prose, drawn by a seeded generator."""

    def __init__(self, model_path: Path, seed: int) -> None:
        self.tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))
        self._ids: Sequence[int] = self.tokenizer.encode(prose(), add_special_tokens=False).ids
        self._rng = random.Random(seed)  # noqa: S311 a reproducible choice of prose, not a secret

    def prompt(self, token_count: int) -> tuple[int, ...]:
        """A window of exactly ``token_count`` tokens at a random place."""
        start = self._rng.randrange(len(self._ids) - token_count)
        return tuple(self._ids[start : start + token_count])
