"""Is what comes through router, prefill and decode, token for token, what one monolithic engine says?

Pure but for the corpus: builds the cases, derives what is expected from the oracle's answers, judges. Running
them is ``bench/soak.py``'s and the tests' business.

A difference is *wrong* unless the oracle itself says it can only be rounding: at the first differing position the
token that came lies within ``tie_gap`` of the oracle's best in log probability. bfloat16 has 8 significant bits:
logits around 20 are multiples of 1/8, so another batch shape may move a logit by that much; float32 moves it by about
1e-5 of it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from bench.corpus import Corpus

TIE_GAP_BFLOAT16 = 0.25
"""Two roundings of one bfloat16 step (1/8 for logits between 16 and 32), one on either token."""
TIE_GAP_FLOAT32 = 1e-3


@dataclass(frozen=True, slots=True)
class Case:
    """One request to compare."""

    name: str
    prompt_token_ids: tuple[int, ...] = field(repr=False)
    max_token_count: int
    ignore_eos: bool = True
    stop_sequences: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class OracleAnswer:
    """What one engine says alone: ids, and per position the next best tokens with their gaps to the best, nats."""

    token_ids: tuple[int, ...]
    rivals: tuple[tuple[tuple[int, float], ...], ...]
    text: str = ""
    """As that engine detokenises it; of answers in other modes than greedy also the next two."""
    finish: str = ""
    """"stop" or "length"."""
    logprobs: tuple[tuple[float, int], ...] = ()
    """Per position: of the token drawn, log probability and rank."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came through the service."""

    token_ids: tuple[int, ...]
    text: str
    finish: str
    """"STOP", "MAX_OUTPUT_TOKENS" or "CONTEXT_FULL"."""
    placement: str = ""
    recomputed_token_count: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """``kind``: "exact", "tie" or "wrong"."""

    case: str
    kind: str
    detail: str = ""
    gap: float = 0.0
    index: int = -1


def base_cases(corpus: Corpus, block_token_count: int, count: int, max_length: int, seed: int) -> list[Case]:
    """Cases that need no knowledge of the answer.

    At least ``count``: every residue of the length modulo the block size where ``count`` allows, lengths exactly on
    block boundaries, 1 to ``max_length`` tokens, some with one token of output, some that may stop at EOS.
    """
    rng = random.Random(seed)  # noqa: S311 a reproducible choice of lengths
    lengths: list[int] = [1, 2, 3]
    lengths += [
        length
        for block in range(block_token_count, max_length + 1, block_token_count)
        for length in (block - 1, block, block + 1)
        if length <= max_length and (block <= 4 * block_token_count or rng.random() < 0.2)
    ]
    residues = list(range(block_token_count))
    rng.shuffle(residues)
    for residue in residues:
        blocks = rng.randrange(0, max(1, max_length // block_token_count // 4))
        lengths.append(max(1, min(max_length, blocks * block_token_count + residue)))
    while len(lengths) < count:
        # Log-uniform: short prompts are common, long ones are present.
        lengths.append(round(max_length ** rng.random()))
    lengths = lengths if count >= len(lengths) else sorted(rng.sample(lengths, count))
    lengths[-1] = max_length
    cases = []
    for number, length in enumerate(lengths):
        tokens = 1 if number % 17 == 3 else rng.choice((2, 3, 8, 16, 24))
        cases.append(
            Case(
                name=f"{number:03d}-length-{length}-max-{tokens}",
                prompt_token_ids=corpus.prompt(length),
                max_token_count=tokens,
                ignore_eos=number % 5 != 0,
            )
        )
    return cases


def eos_first_cases(corpus: Corpus, lengths: Sequence[int]) -> list[Case]:
    """Prompts after which the model says end-of-sequence at once: a conversation whose last answer is complete.

    The prompt ends in a finished sentence of the assistant, filled before to the length asked for.
    """
    tail = corpus.tokenizer.encode(
        "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\nThe capital of France is Paris.",
        add_special_tokens=False,
    ).ids
    head = corpus.tokenizer.encode("<|im_start|>system\n", add_special_tokens=False).ids
    cases = []
    for length in lengths:
        filler = length - len(tail) - len(head)
        prompt = (*head, *corpus.prompt(filler), *tail) if filler > 0 else tuple(tail[-length:])
        cases.append(Case(f"eos-first-length-{length}", prompt, 8, ignore_eos=False))
    return cases


def stop_cases(corpus: Corpus, cases: Sequence[Case], answers: Mapping[str, OracleAnswer]) -> list[Case]:
    """From answered cases, ones that must stop: inside the first token, across it, later, and at a token id."""
    derived = []
    for case in cases:
        ids = answers[case.name].token_ids
        if len(ids) < 6:
            continue
        first = corpus.tokenizer.decode(list(ids[:1]))
        two = corpus.tokenizer.decode(list(ids[:2]))
        later = corpus.tokenizer.decode(list(ids[2:5]))
        if len(first.strip()) >= 2:
            derived.append(replace(case, name=f"{case.name}-stop-inside-first", stop_sequences=(first.strip()[1:],)))
        if len(two) > len(first) and first:
            across = first[-1] + two[len(first) : len(first) + 1]
            derived.append(replace(case, name=f"{case.name}-stop-across-first", stop_sequences=(across,)))
        if len(later.strip()) >= 2:
            derived.append(replace(case, name=f"{case.name}-stop-later", stop_sequences=(later.strip(),)))
        derived.append(replace(case, name=f"{case.name}-stop-token", stop_token_ids=(ids[3],)))
    return derived


def expected(corpus: Corpus, case: Case, oracle: OracleAnswer, eos_token_id: int) -> Answer:
    """What the service must say, worked out the dumb way from the oracle's tokens (made with ``ignore_eos``)."""
    stops = set(case.stop_token_ids) | (set() if case.ignore_eos else {eos_token_id})
    ids: list[int] = []
    text_ids: list[int] = []
    for token in oracle.token_ids[: case.max_token_count]:
        ids.append(token)
        if token in stops:
            return Answer(tuple(ids), corpus.tokenizer.decode(text_ids), "STOP")
        text_ids.append(token)
        text = corpus.tokenizer.decode(text_ids)
        found = [position for stop in case.stop_sequences if (position := text.find(stop)) >= 0]
        if found:
            return Answer(tuple(ids), text[: min(found)], "STOP")
    return Answer(tuple(ids), corpus.tokenizer.decode(text_ids), "MAX_OUTPUT_TOKENS")


def judge(case: Case, want: Answer, got: Answer, oracle: OracleAnswer, tie_gap: float) -> Verdict:
    """Compares tokens, text and finish; see the module's docstring for what counts as a tie."""
    for index, (wanted, came) in enumerate(zip(want.token_ids, got.token_ids, strict=False)):
        if wanted != came:
            gap = dict(oracle.rivals[index]).get(came, math.inf)
            kind = "tie" if gap <= tie_gap else "wrong"
            return Verdict(case.name, kind, f"position {index}: {came} for {wanted}, gap {gap:.4f}", gap, index)
    if len(want.token_ids) != len(got.token_ids):
        return Verdict(case.name, "wrong", f"{len(got.token_ids)} tokens for {len(want.token_ids)}")
    # A text may end inside a character: the oracle decodes that to U+FFFD, the service says nothing of it.
    if want.text.rstrip("\ufffd") != got.text.rstrip("\ufffd"):
        return Verdict(case.name, "wrong", "same tokens, another text")
    if want.finish != got.finish:
        return Verdict(case.name, "wrong", f"finished {got.finish} for {want.finish}")
    return Verdict(case.name, "exact")
