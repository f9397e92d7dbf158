"""A set of exactness cases and the oracle's answers to them: made once, asked of any fleet.

Runs ``bench.oracle`` in a process of its own, since an oracle must share nothing with what it judges.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.corpus import Corpus
from bench.exactness import Case, OracleAnswer, base_cases, eos_first_cases, stop_cases
from bench.oracle import OraclePrompt, read_answers, write_prompts
from kvtransfer.connector_parent import OWNER_VARIABLE


@dataclass(frozen=True, slots=True)
class Questions:
    """``oracle`` answers every case by name, always as if ``ignore_eos``: ``exactness.expected`` does the rest."""

    corpus: Corpus
    cases: tuple[Case, ...]
    oracle: dict[str, OracleAnswer]
    eos_token_id: int
    held_back: dict[str, Case]
    """Cases nobody asked yet, so that no cache knows them; by name."""


def eos_token_id_of(model_path: Path) -> int:
    value = json.loads((model_path / "generation_config.json").read_text())["eos_token_id"]
    return int(value[0] if isinstance(value, list) else value)


async def make_questions(
    model_path: Path,
    *,
    count: int,
    max_length: int,
    seed: int,
    dtype: str = "bfloat16",
    block_token_count: int = 128,
    cores: str = "0",
    stop_base_count: int = 12,
    held_back: Sequence[tuple[str, int, int]] = (),
) -> Questions:
    """``count`` plain cases, EOS as the first token at boundary lengths, stop cases, and repeats of some prompts
    (which hit the prefix cache of both sides). ``held_back``: name, prompt length and token count of further ones.
    Takes the oracle's start (half a minute) and its computing."""
    corpus = Corpus(model_path, seed)
    plain = base_cases(corpus, block_token_count, count, max_length, seed)
    eos = eos_first_cases(corpus, (33, block_token_count - 1, block_token_count, block_token_count + 1, 300))
    aside = {name: Case(name, corpus.prompt(length), token_count) for name, length, token_count in held_back}
    oracle = await ask_oracle(model_path, [*plain, *eos, *aside.values()], dtype=dtype, cores=cores)
    long_enough = [case for case in plain if case.max_token_count >= 8]
    stops = stop_cases(corpus, long_enough[:stop_base_count], oracle)
    repeats = [replace(case, name=f"{case.name}-again") for case in plain[:: max(1, len(plain) // 12)]]
    cases = (*plain, *eos, *stops, *repeats)
    for case in (*stops, *repeats):
        oracle[case.name] = oracle[_original(case.name)]
    return Questions(corpus, cases, oracle, eos_token_id_of(model_path), aside)


def _original(name: str) -> str:
    for suffix in ("-stop-inside-first", "-stop-across-first", "-stop-later", "-stop-token", "-again"):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    raise ValueError(f"{name} is not derived from another case")


async def ask_oracle(
    model_path: Path, cases: Sequence[Case], *, dtype: str, cores: str, timeout_s: float = 3600.0
) -> dict[str, OracleAnswer]:
    """What one monolithic engine says to each case, EOS ignored. Raises ``RuntimeError`` with its last words."""
    prompts = [
        OraclePrompt(case.name, case.prompt_token_ids, case.max_token_count, ignore_eos=True) for case in cases
    ]
    return await ask_oracle_in_words(model_path, prompts, "--dtype", dtype, "--cores", cores, timeout_s=timeout_s)


async def ask_oracle_in_words(
    model_path: Path, asked: Sequence[OraclePrompt], *options: str, timeout_s: float = 3600.0
) -> dict[str, OracleAnswer]:
    """What one monolithic engine says to each prompt, in a process of its own; ``options`` of its command line.
    Raises ``RuntimeError`` with its last words."""
    with tempfile.TemporaryDirectory(prefix="baton-oracle-") as folder:
        prompts, answers = Path(folder, "prompts.json"), Path(folder, "answers.json")
        write_prompts(prompts, asked)
        arguments = ("--model", str(model_path), "--prompts", str(prompts), "--out", str(answers))
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "bench.oracle",
            *arguments,
            *options,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, OWNER_VARIABLE: str(os.getpid())},  # it ends with us, however we end
        )
        try:
            async with asyncio.timeout(timeout_s):
                said, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            raise RuntimeError(f"the oracle failed ({process.returncode}): {said.decode(errors='replace')[-2000:]}")
        return read_answers(answers)
