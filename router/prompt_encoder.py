"""A prompt in any of its three forms to token ids.

Owns the order tokenizer after template; never checks ranges (validation.py does, before this costs anything).
"""

from __future__ import annotations

from baton.errors import FieldViolation, invalid_request, prompt_too_long
from baton.request import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from router.chat_template import ChatTemplate
from router.tokenizer import Tokenizer
from router.validation import ModelLimits, check_prompt_length


class PromptEncoder:
    """Stateless; one per process."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        self._template = template

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
            raise invalid_request(
                [FieldViolation("chat", f"model {limits.model} has no chat template; send text or token_ids")]
            )
        max_token_count = limits.max_prompt_token_count
        max_chars = self._tokenizer.max_text_bytes(max_token_count)
        text = self._template.render(prompt.messages, max_chars=max_chars)
        if text is None:
            raise prompt_too_long(max_token_count + 1, max_token_count, is_lower_bound=True)
        # The template writes the special tokens itself: adding them again would double the first.
        return await self._tokenizer.encode_bounded(text, max_token_count=max_token_count, add_special_tokens=False)
