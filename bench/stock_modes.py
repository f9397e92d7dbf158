"""What vLLM's own disaggregated serving makes of every sampling mode: ``python -m bench.soak modes-stock``.

Two plain vLLM servers with the stock ``NixlConnector``, one oracle, modes and prompts of ``bench/mode_questions.py``.
Between the servers stands what a router does, in the two flows there are:

- *decode draws*: vLLM's own. A prefill leg with ``max_tokens`` 1 whose token is thrown away, then the untouched
  request with the transfer parameters to decode, which draws every token. Token 1 waits for the transfer.
- *prefill draws*: the prefill leg's token goes to the caller, and decode continues *prompt + token*, which is all
  that the stock connector offers for it. What a router can put right from outside it does (lengths less one, an end
  at the first token, logprobs and text joined), so that what is left wrong is not the router's doing.

Nothing here decides what is right: the oracle's answers do, by the same rules as for Baton.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import signal
import tempfile
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp

from baton.request import Role
from bench import evidence
from bench.corpus import Corpus
from bench.exactness import TIE_GAP_FLOAT32, OracleAnswer
from bench.mode_questions import LOGPROB_GAP, PROMPT_LENGTHS, Question, questions
from bench.modes import ORACLE_CONCURRENCY, Difference, ask_both_oracles, gaps_of
from bench.peers import SYSTEMS, start_system
from bench.real_fleet import fleet_config
from bench.soaking import SEED, model_directory, say
from bench.stock_proxy import PREFILL_PARAMS

SIDE_BY_SIDE = 8
BLOCK_TOKEN_COUNT = 128
LOGPROB_COUNT = 5
LEG_TIMEOUT_S = 120.0
KV_CACHE_BYTES = 2**31
"""Room for every prompt at once: the warm flow is to find them all."""
FLOWS = ("decode draws", "prefill draws", "decode draws, warm")


@dataclass(slots=True)
class Said:
    """One leg's answer, or two joined."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = ""
    logprobs: list[float] = field(default_factory=list)
    transfer_params: dict[str, Any] | None = None


class RefusedError(Exception):
    """A server said no; carries its status and the kind of error, never its text, which may quote the prompt."""


@dataclass(frozen=True, slots=True)
class StockVerdict:
    """``kind``: "exact", "tie", "wrong", "logprobs wrong", "refused", "not asked" or "failed"."""

    question: str
    mode: str
    flow: str
    kind: str
    detail: str = ""
    index: int = -1
    came: int = -1
    """The token at ``index``, where the oracle has another."""
    prefill_refusal: str = ""
    """Why its prefill leg was refused as the caller wrote it, and asked again without its least length."""
    is_pull_missed: bool = False
    """The prefill leg gave nothing to pull: decode computed the prompt again."""


class Router:
    """Stands between the two servers. ``ask`` gives an answer or raises ``RefusedError``."""

    def __init__(self, session: aiohttp.ClientSession, urls: dict[Role, str], model_name: str) -> None:
        self._session = session
        self._urls = urls
        self._model_name = model_name

    async def _leg(self, role: Role, body: dict[str, Any], request_id: str) -> Said:
        url = f"{self._urls[role]}/v1/completions"
        async with self._session.post(url, json=body, headers={"X-Request-Id": request_id}) as answer:
            document = await answer.json(content_type=None)
            if answer.status != 200:
                kind = document.get("error", {}) if isinstance(document, dict) else {}
                what = kind.get("param") or kind.get("type") or "no reason"
                raise RefusedError(f"{role.value} {answer.status}: {what}")
        (choice,) = document["choices"]
        return Said(
            list(choice["token_ids"]),
            choice["text"],
            choice["finish_reason"],
            list(choice["logprobs"]["token_logprobs"]),
            document.get("kv_transfer_params"),
        )

    def body(self, question: Question) -> dict[str, Any]:
        """The caller's request, in vLLM's words."""
        stop = question.mode.stop
        return {
            "model": self._model_name,
            "prompt": list(question.prompt_token_ids),
            "max_tokens": stop.max_output_token_count,
            "ignore_eos": stop.ignore_eos,
            "stop_token_ids": list(stop.stop_token_ids),
            "temperature": 0.0,
            "logprobs": LOGPROB_COUNT,
            "return_token_ids": True,
            "stream": False,
            **question.mode.words,
        }

    async def prefill(self, body: dict[str, Any], request_id: str) -> tuple[Said, str]:
        """The first leg, and why it was refused as the caller wrote it: a least length beyond its one token. It is
        asked again without, as vLLM's own example of a router does from the start."""
        body = {**body, "max_tokens": 1, "kv_transfer_params": PREFILL_PARAMS}
        try:
            return await self._leg(Role.PREFILL, body, request_id), ""
        except RefusedError as error:
            if not body.pop("min_tokens", 0):
                raise
            refusal = str(error)
        return await self._leg(Role.PREFILL, body, request_id), refusal

    async def decode_draws(self, question: Question) -> tuple[Said, str, bool]:
        body, request_id = self.body(question), uuid.uuid4().hex
        first, refusal = await self.prefill(body, request_id)
        if first.transfer_params:
            body["kv_transfer_params"] = first.transfer_params
        return await self._leg(Role.DECODE, body, request_id), refusal, not first.transfer_params

    async def prefill_draws(self, question: Question) -> tuple[Said, str, bool]:
        body, request_id = self.body(question), uuid.uuid4().hex
        least = body.pop("min_tokens", 0)
        # The one token must not be an end, if a least length is asked for: that much a router knows.
        first, refusal = await self.prefill({**body, "min_tokens": min(1, least)}, request_id)
        if first.finish == "stop" or body["max_tokens"] == 1:
            return first, refusal, False
        body |= {
            "prompt": [*body["prompt"], *first.token_ids],
            "max_tokens": body["max_tokens"] - 1,
            "min_tokens": max(0, least - 1),
            "kv_transfer_params": first.transfer_params,
        }
        rest = await self._leg(Role.DECODE, body, request_id)
        joined = Said(
            first.token_ids + rest.token_ids, first.text + rest.text, rest.finish, first.logprobs + rest.logprobs
        )
        return joined, refusal, not first.transfer_params


def judge_stock(question: Question, flow: str, wanted: OracleAnswer, said: Said) -> StockVerdict:
    """What kind of answer it is, and where it differs. Tokens first: with others, nothing else can agree."""

    def verdict(kind: str, detail: str = "", index: int = -1, came: int = -1) -> StockVerdict:
        return StockVerdict(question.name, question.mode.name, flow, kind, detail, index, came)

    for index, (want, came) in enumerate(zip(wanted.token_ids, said.token_ids, strict=False)):
        if want != came:
            return verdict("wrong", f"token {index + 1} differs", index, came)
    if len(wanted.token_ids) != len(said.token_ids):
        return verdict("wrong", f"{len(said.token_ids)} tokens for {len(wanted.token_ids)}")
    if wanted.finish != said.finish:
        return verdict("wrong", f"ended by {said.finish} for {wanted.finish}")
    if wanted.text.rstrip("\ufffd") != said.text.rstrip("\ufffd"):
        return verdict("wrong", "same tokens, another text")
    if len(said.logprobs) != len(wanted.logprobs):
        return verdict("logprobs wrong", f"{len(said.logprobs)} for {len(wanted.logprobs)}")
    for index, (came_logprob, (logprob, _)) in enumerate(zip(said.logprobs, wanted.logprobs, strict=True)):
        if not math.isclose(came_logprob, logprob, rel_tol=0, abs_tol=LOGPROB_GAP):
            return verdict("logprobs wrong", f"of token {index + 1}")
    return verdict("exact")


def ends_the_engine(question: Question, flow: str) -> bool:
    """Whether a stock decode engine, asked this with one token more, ends with an assertion: the prompt fills its
    last block, and the engine counts a block that the other side never had."""
    return flow == "prefill draws" and len(question.prompt_token_ids) % BLOCK_TOKEN_COUNT == 0


async def ask_stock(
    router: Router,
    asked: Sequence[Question],
    oracle: dict[str, OracleAnswer],
    flow: str,
    verdicts: list[StockVerdict],
) -> None:
    slots = asyncio.Semaphore(SIDE_BY_SIDE)

    async def one(question: Question) -> None:
        async with slots:
            name, mode = question.name, question.mode.name
            if ends_the_engine(question, flow):
                verdicts.append(StockVerdict(name, mode, flow, "not asked", "would end the engine"))
                return
            ask = router.prefill_draws if flow == "prefill draws" else router.decode_draws
            try:
                said, refusal, is_missed = await ask(question)
            except RefusedError as error:
                verdicts.append(StockVerdict(name, mode, flow, "refused", str(error)))
            except (aiohttp.ClientError, TimeoutError) as error:
                verdicts.append(StockVerdict(name, mode, flow, "failed", type(error).__name__))
            else:
                verdict = judge_stock(question, flow, oracle[name], said)
                verdicts.append(replace(verdict, prefill_refusal=refusal, is_pull_missed=is_missed))

    await asyncio.gather(*(one(question) for question in asked))


async def _full_block(router: Router, corpus: Corpus, asked: Sequence[Question]) -> str:
    """What becomes of the decode server when a prompt that fills its last block is continued by one token."""
    question = replace(asked[0], name="full block", prompt_token_ids=corpus.prompt(2 * BLOCK_TOKEN_COUNT))
    verdicts: list[StockVerdict] = []
    try:
        said, _, _ = await asyncio.wait_for(router.prefill_draws(question), 30.0)
        verdict = f"answered {len(said.token_ids)} tokens"
    except (RefusedError, aiohttp.ClientError, TimeoutError) as error:
        verdict = f"failed ({error or type(error).__name__})"
    await ask_stock(router, [asked[0]], {}, "prefill draws", verdicts)
    return f"{verdict}; the next request: {verdicts[0].kind}"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stock-prompts", type=int, default=4, help="prompts of each mode, asked in three flows")


async def run(options: argparse.Namespace) -> bool:
    """True whatever it finds: it promises nothing of somebody else's software."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    model = model_directory()
    corpus = Corpus(model, SEED + 1)
    asked = questions(corpus, options.stock_prompts, SEED + 1)
    say(f"modes-stock: asking the oracle {len(asked)} questions")
    step_token_count = ORACLE_CONCURRENCY * (max(PROMPT_LENGTHS) + 64)
    oracle = await ask_both_oracles(
        model,
        [each.for_oracle() for each in asked],
        *("--concurrency", str(ORACLE_CONCURRENCY), "--max-batched-tokens", str(step_token_count)),
    )
    verdicts: list[StockVerdict] = []
    full_block = "not tried"
    try:
        with tempfile.TemporaryDirectory() as folder:
            # No prompt in two steps: a seeded one would end a plain engine on CPU, with a connector or without.
            config = fleet_config(
                model, Path(folder), prefill_cores="[[0]]", decode_cores="[[1]]", dtype="float32",
                max_batched_token_count=step_token_count,
            )  # fmt: skip
            # The compiler of grammars that the oracle has: another one permits another white space.
            extra = {"structured_outputs_config": '{"backend": "guidance"}'}
            engines = {
                role: replace(each, extra_args=extra, kv_cache_bytes=KV_CACHE_BYTES)
                for role, each in config.engines.items()
            }
            config = replace(config, engines=engines)
            system = await asyncio.to_thread(
                start_system, SYSTEMS["stock-pd"], config, Path(folder, "unused"), Path(folder)
            )
            try:
                timeout = aiohttp.ClientTimeout(total=LEG_TIMEOUT_S)
                async with aiohttp.ClientSession(timeout=timeout) as session:
                    router = Router(session, system.leg_urls, config.engines[Role.PREFILL].model_name)
                    for flow in FLOWS:
                        await ask_stock(router, asked, oracle, flow, verdicts)
                        say(f"modes-stock: {flow}: {dict(Counter(v.kind for v in verdicts if v.flow == flow))}")
                    full_block = await _full_block(router, corpus, asked)
                    say(f"modes-stock: a prompt that fills its last block: {full_block}")
            finally:
                await asyncio.to_thread(system.stop)
        verdicts[:] = await _settled(verdicts, asked, oracle, model)
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        if verdicts:
            _write(asked, verdicts, full_block)
    return True


async def _settled(
    verdicts: Sequence[StockVerdict], asked: Sequence[Question], oracle: dict[str, OracleAnswer], model: Path
) -> list[StockVerdict]:
    """As Baton's: a wrong token that the engine itself cannot tell from its best is a tie."""
    differences = [Difference(each.question, each.index, each.came) for each in verdicts if each.index >= 0]
    gaps = await gaps_of(differences, asked, oracle, model)
    return [
        replace(each, kind="tie")
        if gaps.get(Difference(each.question, each.index, each.came), math.inf) <= TIE_GAP_FLOAT32
        else each
        for each in verdicts
    ]


def _write(asked: Sequence[Question], verdicts: Sequence[StockVerdict], full_block: str) -> None:
    rows = []
    for mode in dict.fromkeys(question.mode.name for question in asked):
        row: dict[str, Any] = {"mode": mode}
        for flow in FLOWS:
            row[flow] = _told([each for each in verdicts if each.mode == mode and each.flow == flow])
        rows.append(row)
    lengths = [len(question.prompt_token_ids) for question in asked]
    refusals = Counter(each.prefill_refusal for each in verdicts if each.prefill_refusal)
    full_count = sum(length % BLOCK_TOKEN_COUNT == 0 for length in lengths)
    summary = [
        f"{sum(each.kind != 'not asked' for each in verdicts)} requests to two servers with the stock NixlConnector "
        f"(of {len(asked) * len(FLOWS)}, less those that would end an engine), float32; "
        f"prompts of {min(lengths)} to {max(lengths)} tokens, of which {full_count} fill their last block; "
        "compared with one monolithic engine as Baton is: token ids, ending, text, log probabilities "
        f"(within {LOGPROB_GAP:g} nats)",
        "decode draws: vLLM's own flow. Prefill's token is thrown away, so that the caller's first token waits for "
        "the transfer, in every mode; decode computes the last token of the prompt again",
        "decode draws, warm: the same requests once more, their prefixes in both caches",
        "prefill draws: prefill's token goes to the caller, and decode continues prompt + token; lengths, endings at "
        "the first token, logprobs and text are put right by the router",
        "engine steps are so large that no prompt takes two: with a seed, two would end a plain engine on CPU, with "
        "a connector or without",
        *(f"{flow}: {_told([each for each in verdicts if each.flow == flow])}" for flow in FLOWS),
        f"prefill legs refused as the caller wrote them, and asked again without min_tokens: {_counted(refusals)}",
        "not asked, where prefill draws: prompts that fill their last block. One was asked at the end: " + full_block,
    ]
    evidence.write("modes-stock", "Every sampling mode on the stock connector", summary, rows, verdicts)


def _told(mine: Sequence[StockVerdict]) -> str:
    told = _counted(Counter(each.kind for each in mine))
    if len({each.mode for each in mine}) == 1 and (
        details := dict.fromkeys(each.detail for each in mine if each.kind not in ("exact", "not asked"))
    ):
        told += f" ({'; '.join(details)})"
    if refused := sum(bool(each.prefill_refusal) for each in mine):
        told += f"; prefill leg refused as written: {refused}"
    if missed := sum(each.is_pull_missed for each in mine):
        told += f"; nothing to pull: {missed}"
    return told or "–"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"
