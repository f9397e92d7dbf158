"""A batch job: JSON lines in, JSON lines out, so many requests at once and no more, and it can be begun again.

    .venv/bin/python examples/batch.py prompts.jsonl answers.jsonl --concurrency 16

In: ``{"id": "1", "prompt": "…"}`` a line. Out, in the order in which answers come:
``{"id": "1", "text": "…", "reason": "stop", "output_token_count": 12}``, or
``{"id": "1", "error": {"reason": "PROMPT_TOO_LONG", "message": "…"}}`` for a request that can never succeed.
What failed otherwise is left out: run the same command again, and it does what is missing.

What to copy from here: as many workers as requests at once, so that nothing piles up; a refusal that says when to
come back is waited out, not hammered; one line is written whole, and one that a crash cut is dropped and done again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from baton.client import BatonClient, Tls
from baton.errors import BatonError, Interrupted, InvalidRequest
from baton.request import StopConditions

MAX_BACKOFF_S = 30.0


class Batch:
    """One run. ``answered_count``, ``refused_count``: written now; ``left_count``: for the next run."""

    def __init__(self, client: BatonClient, out: TextIO, options: argparse.Namespace) -> None:
        self._client = client
        self._out = out
        self._options = options
        self.answered_count = self.refused_count = self.left_count = 0

    async def run(self, items: Iterator[dict[str, Any]]) -> None:
        """Every worker takes the next item when it is done with its last: the input is read no faster."""
        async with asyncio.TaskGroup() as workers:
            for _ in range(self._options.concurrency):
                workers.create_task(self._work(items))

    async def _work(self, items: Iterator[dict[str, Any]]) -> None:
        for item in items:
            try:
                written = await self._answer(item)
                self.answered_count += 1
            except InvalidRequest as error:
                written = {"error": {"reason": error.reason.value, "message": error.message}}
                self.refused_count += 1
            except ValueError as error:  # what no message can carry, such as half a surrogate pair
                written = {"error": {"reason": "INVALID_REQUEST", "message": str(error)}}
                self.refused_count += 1
            except BatonError as error:
                self.left_count += 1
                print(f"{item['id']}: {error.reason.value}, left for the next run", file=sys.stderr)
                continue
            self._out.write(json.dumps({"id": item["id"], **written}, ensure_ascii=False) + "\n")
            self._out.flush()

    async def _answer(self, item: dict[str, Any]) -> dict[str, Any]:
        stop = StopConditions(max_output_token_count=self._options.max_tokens)
        for attempt in range(self._options.attempts):
            try:
                answer = await self._client.complete_chat(
                    [("user", item["prompt"])], timeout=self._options.timeout, stop=stop, priority=-10
                )
                break
            except BatonError as error:
                # Interrupted: some of the answer came and the rest is lost. Nobody has seen it, so begin anew.
                is_worth_it = error.is_retryable or isinstance(error, Interrupted)
                if not is_worth_it or attempt + 1 == self._options.attempts:
                    raise
                # The server's word first; without one, ever longer. Spread, so that workers do not come back as one.
                wait_s = error.retry_after_s or min(0.5 * 2**attempt, MAX_BACKOFF_S)
                await asyncio.sleep(wait_s * random.uniform(1.0, 1.5))  # noqa: S311  # no secret
        return {
            "text": answer.text,
            "reason": answer.reason.value if answer.reason else None,
            "output_token_count": answer.usage.output_token_count,
        }


def done_ids(path: Path) -> set[str]:
    """Of the lines that are there already. Cuts off a last line that a crash left unfinished."""
    if not path.exists():
        return set()
    with path.open("rb+") as file:
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        file.truncate(len(whole))
    return {str(json.loads(line)["id"]) for line in whole.splitlines()}


def items_of(lines: TextIO, done: set[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            item = {"id": str(item["id"]), "prompt": str(item["prompt"])}
        except (ValueError, KeyError, TypeError):
            raise SystemExit(f'line {number} is not {{"id": ..., "prompt": ...}}') from None
        if item["id"] not in done:
            yield item


async def main() -> int:
    parser = argparse.ArgumentParser(description="Answers a file of prompts.")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--address", default="127.0.0.1:50051")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at once (%(default)s)")
    parser.add_argument("--attempts", type=int, default=8, help="of one request, before it is left (%(default)s)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one attempt (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=256)
    options = parser.parse_args()
    done = done_ids(options.answers)
    async with BatonClient(options.address, tls=Tls.from_environment()) as client:
        with options.prompts.open(encoding="utf-8") as prompts, options.answers.open("a", encoding="utf-8") as out:
            batch = Batch(client, out, options)
            await batch.run(items_of(prompts, done))
            os.fsync(out.fileno())
    print(
        f"{batch.answered_count} answered, {batch.refused_count} refused for good, {batch.left_count} left, "
        f"{len(done)} there before",
        file=sys.stderr,
    )
    return 1 if batch.left_count else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
