"""The prompt as the model read it, told ahead of the answer: a stage between relay and caller.

Made of the token ids alone, or of what the relay brought of their logprobs. Text is as the tokenizer spells it,
special tokens included, so that what a template did to the prompt can be seen.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from router.answering import Admitted, PromptPart, RelayEvent
from router.samples.prompt_parts import prompt_parts
from router.tokenizer import Detokenizer


async def with_prompt(
    events: AsyncGenerator[RelayEvent, None],
    token_ids: tuple[int, ...],
    *,
    is_brought: bool,
    detokenizer: Detokenizer | None,
) -> AsyncGenerator[RelayEvent, None]:
    """``events`` with the prompt's parts behind ``Admitted``. ``is_brought``: the relay brings them, for their
    logprobs. ``detokenizer``: one that spells special tokens out; None where no text was asked for."""
    last_index = len(token_ids)
    async with aclosing(events):
        async for event in events:
            match event:
                case PromptPart():
                    yield _spelled(event, detokenizer, last_index)
                case Admitted() if not is_brought:
                    yield event
                    for part in prompt_parts(token_ids):
                        yield _spelled(part, detokenizer, last_index)
                case _:
                    yield event


def _spelled(part: PromptPart, detokenizer: Detokenizer | None, last_index: int) -> PromptPart:
    if detokenizer is None:
        return part
    text = detokenizer.push(part.token_ids)
    if part.first_token_index + len(part.token_ids) == last_index:
        text += detokenizer.flush()
    return replace(part, text=text)
