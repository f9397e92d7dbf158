"""A prompt in any of its three forms to token ids.

Owns the order tokenizer after template, and which rules chats have here; ranges of other prompts are validation.py's.
"""

from __future__ import annotations

import asyncio

from baton.errors import FieldViolation, invalid_request, prompt_too_long
from baton.request import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from router.chats.chat_abilities import ChatAbilities
from router.chats.chat_template import ChatTemplate
from router.chats.validation_chat import chat_violations, template_arguments
from router.tokenizer import Tokenizer
from router.validation import ModelLimits, check_prompt_length


class PromptEncoder:
    """Stateless; one per process."""

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate | None, abilities: ChatAbilities | None = None
    ) -> None:
        """``abilities``: without them, what the template alone knows."""
        self._tokenizer = tokenizer
        self._template = template
        self.abilities = abilities or abilities_of(template)

    def violations(self, prompt: Prompt) -> list[FieldViolation]:
        """Every broken rule of a chat; of other prompts, validation.py knows all."""
        return chat_violations(prompt, self.abilities) if isinstance(prompt, ChatPrompt) else []

    async def encode(self, prompt: Prompt, limits: ModelLimits) -> tuple[int, ...]:
        """At least one and at most ``limits.max_prompt_token_count`` ids. Raises PROMPT_TOO_LONG, or
        INVALID_REQUEST when there is nothing to encode or the chat template refuses."""
        match prompt:
            case TokenPrompt(token_ids):
                ids = token_ids
            case TextPrompt(text):
                ids = await self._tokenizer.encode_bounded(text, max_token_count=limits.max_prompt_token_count)
            case ChatPrompt():
                ids = await self._encode_chat(prompt, limits)
        check_prompt_length(len(ids), limits)
        return ids

    async def _encode_chat(self, prompt: ChatPrompt, limits: ModelLimits) -> tuple[int, ...]:
        if self._template is None:
            raise invalid_request(self.violations(prompt))
        max_token_count = limits.max_prompt_token_count
        max_chars = self._tokenizer.max_text_bytes(max_token_count)
        text = self._template.render(
            prompt.messages,
            max_chars=max_chars,
            tools=prompt.tools,
            arguments=template_arguments(prompt),
            clock=asyncio.get_running_loop().time,
        )
        if text is None:
            raise prompt_too_long(max_token_count + 1, max_token_count, is_lower_bound=True)
        # The template writes the special tokens itself: adding them again would double the first.
        return await self._tokenizer.encode_bounded(text, max_token_count=max_token_count, add_special_tokens=False)


def abilities_of(
    template: ChatTemplate | None,
    *,
    tool_parser: str = "",
    reasoning_parser: str = "",
    template_argument_names: tuple[str, ...] = (),
) -> ChatAbilities:
    """What chats may ask with this template and what the operator set besides."""
    return ChatAbilities(
        has_chat=template is not None,
        knows_tools=template is not None and template.knows_tools,
        message_fields=frozenset() if template is None else template.known_message_fields,
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
        template_argument_names=template_argument_names,
    )
