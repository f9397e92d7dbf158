"""Text to token ids and back, with the model's own tokenizer.json.

Owns the vocabulary: its size, its special tokens and the ids that end an answer. Never renders chats
(chat_template.py), never looks for stop sequences (stop_sequences.py), never blocks the event loop for a
long text.

Two detokenisers. Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM ...) is exact: each token is a fixed run of bytes,
so an incremental UTF-8 decoder gives, for any chunking, the text of the whole. For other decoders, whose token
text depends on its neighbours, a window of the last tokens is decoded again at each step.
"""

from __future__ import annotations

import asyncio
import codecs
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer as HfTokenizer

from baton.errors import prompt_too_long

OFF_LOOP_BYTES = 8192
"""Longer texts are tokenised in a thread: 8 KiB take about 4 ms, which is what one event-loop turn may cost."""

_NORMALIZER_SHRINK = 4
"""How much a normalizer may shorten a text (NFKC's worst case is 3); widens the quick check, never the result."""

OFF_LOOP_TOKENS = 2048
"""More ids are turned into text in a thread: so many take about 1 ms."""
_REPLACEMENT = "�"


class TokenizerError(Exception):
    """The model directory has no usable tokenizer; the message says what is missing and what to do."""


class Detokenizer(Protocol):
    """Token ids in, text out, in order. Special tokens have no text."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Text these ids completed: whole characters only."""

    def flush(self) -> str:
        """What an unfinished character leaves: replacement characters, as a full decode would give. Ends it."""


class Tokenizer:
    """A model's tokenizer. Immutable; one per process."""

    def __init__(self, hf: HfTokenizer, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """``vocab_size``: ids the *model* knows, which may be more than the tokenizer names."""
        hf.no_truncation()  # a silently shortened prompt would be a wrong answer
        hf.no_padding()
        self._hf = hf
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(eos_token_ids)
        self.special_tokens = {
            token_id: token.content
            for token_id, token in sorted(hf.get_added_tokens_decoder().items())
            if token.special
        }
        """As the tokenizer spells them, by id."""
        self.special_token_ids = frozenset(self.special_tokens)
        self._max_token_bytes = max((len(token.encode()) for token in hf.get_vocab()), default=1)
        if hf.normalizer is not None:
            self._max_token_bytes *= _NORMALIZER_SHRINK
        self._bytes_of_id = _byte_level_table(hf) if _is_byte_level(hf) else None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    @classmethod
    def load(cls, model_dir: Path) -> Tokenizer:
        """Reads tokenizer.json, and the end of an answer in the three configurations. Raises ``TokenizerError``."""
        path = model_dir / "tokenizer.json"
        if not model_dir.is_dir():
            raise TokenizerError(f"model directory {model_dir} does not exist")
        if not path.is_file():
            raise TokenizerError(
                f"model directory {model_dir} has no tokenizer.json; Baton needs the fast tokenizer's file"
            )
        try:
            hf = HfTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every malformed file
            raise TokenizerError(f"{path} is not a tokenizer: {error}") from error
        config = read_json_object(model_dir / "config.json")
        generation = read_json_object(model_dir / "generation_config.json")
        vocab_size = config.get("vocab_size")
        if not isinstance(vocab_size, int):
            vocab_size = hf.get_vocab_size()
        eos = _ids(generation.get("eos_token_id")) or _ids(config.get("eos_token_id"))
        # vLLM stops at the tokenizer's own end as well, which a model's configuration need not name.
        named = read_json_object(model_dir / "tokenizer_config.json").get("eos_token")
        if isinstance(named, dict):
            named = named.get("content")
        own = hf.token_to_id(named) if isinstance(named, str) else None
        if own is not None and own not in eos:
            eos = (*eos, own)
        return cls(hf, vocab_size=vocab_size, eos_token_ids=eos)

    def max_text_bytes(self, token_count: int) -> int:
        """A text with more bytes than this has more than ``token_count`` tokens, whatever it says."""
        return token_count * self._max_token_bytes

    @property
    def is_exact(self) -> bool:
        """True when detokenising in pieces provably equals detokenising the whole."""
        return self._bytes_of_id is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of ``text``. Blocks: about 0.5 ms per KiB."""
        return tuple(self._hf.encode(text, add_special_tokens=add_special_tokens).ids)

    async def encode_bounded(
        self, text: str, *, max_token_count: int, add_special_tokens: bool = True
    ) -> tuple[int, ...]:
        """Like ``encode``, in a thread when large. Raises PROMPT_TOO_LONG beyond ``max_token_count``: without
        tokenising at all when even the longest tokens of the vocabulary could not cover the text."""
        byte_count = len(text.encode()) if len(text) * 4 > OFF_LOOP_BYTES else len(text)
        if byte_count > self.max_text_bytes(max_token_count):
            at_least = -(-byte_count // self._max_token_bytes)
            raise prompt_too_long(at_least, max_token_count, is_lower_bound=True)
        if byte_count <= OFF_LOOP_BYTES:
            token_ids = self.encode(text, add_special_tokens=add_special_tokens)
        else:
            loop = asyncio.get_running_loop()
            token_ids = await loop.run_in_executor(
                self._executor, lambda: self.encode(text, add_special_tokens=add_special_tokens)
            )
        if len(token_ids) > max_token_count:
            raise prompt_too_long(len(token_ids), max_token_count)
        return token_ids

    def decode(self, token_ids: Sequence[int], *, keep_special_tokens: bool = False) -> str:
        """The text of the whole; special tokens are left out, or written as the tokenizer spells them. Blocks."""
        return str(self._hf.decode(list(token_ids), skip_special_tokens=not keep_special_tokens))

    async def decode_bounded(self, token_ids: Sequence[int], *, keep_special_tokens: bool = False) -> str:
        """Like ``decode``, in a thread when long."""
        if len(token_ids) <= OFF_LOOP_TOKENS:
            return self.decode(token_ids, keep_special_tokens=keep_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._executor, lambda: self.decode(token_ids, keep_special_tokens=keep_special_tokens)
        )

    def detokenizer(self, *, keep_special_tokens: bool = False) -> Detokenizer:
        """A fresh incremental detokeniser for one answer, or for a prompt with its special tokens spelled out."""
        silent = frozenset[int]() if keep_special_tokens else self.special_token_ids
        if self._bytes_of_id is not None:
            return _ByteLevelDetokenizer(self._bytes_of_id, silent)
        return _WindowDetokenizer(self._hf, silent)

    def close(self) -> None:
        """Ends the thread. Idempotent."""
        self._executor.shutdown(wait=False, cancel_futures=True)


class _ByteLevelDetokenizer:
    def __init__(self, bytes_of_id: Sequence[bytes], special_token_ids: frozenset[int]) -> None:
        self._bytes_of_id = bytes_of_id
        self._special = special_token_ids
        # "replace" in Python and from_utf8_lossy in Rust follow the same rule: one U+FFFD per maximal subpart.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_whole = True
        """No character is begun and not complete."""

    def push(self, token_ids: Sequence[int]) -> str:
        table, special = self._bytes_of_id, self._special
        if len(token_ids) == 1 and 0 <= (token_id := token_ids[0]) < len(table):  # nearly always
            data = b"" if token_id in special else table[token_id]
            if self._is_whole and data.isascii():
                return data.decode("ascii")  # as the decoder would, and it would remember nothing of it
            text = self._utf8.decode(data)
            self._is_whole = not self._utf8.getstate()[0]
            return text
        data = b"".join(table[i] for i in token_ids if 0 <= i < len(table) and i not in special)
        text = self._utf8.decode(data)
        self._is_whole = not self._utf8.getstate()[0]
        return text

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDetokenizer:
    """Decodes the last settled tokens with and without the new ones; the difference is the new text.

    ids:  ... [ window_from ....... settled ....... end )
              already sent as text ^       ^ text still to come
    """

    _MAX_UNSETTLED = 16  # a character has at most 4 bytes; more than this is invalid for good

    def __init__(self, hf: HfTokenizer, special_token_ids: frozenset[int]) -> None:
        self._hf = hf
        self._special = special_token_ids
        self._ids: list[int] = []
        self._settled = 0

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join(self._push_one(i) for i in token_ids if i not in self._special)

    def _push_one(self, token_id: int) -> str:
        self._ids.append(token_id)
        before, whole = self._texts()
        is_incomplete = whole.endswith(_REPLACEMENT) and len(self._ids) - self._settled < self._MAX_UNSETTLED
        if is_incomplete or len(whole) <= len(before):
            return ""
        del self._ids[: self._settled]
        self._settled = len(self._ids)
        return whole[len(before) :]

    def flush(self) -> str:
        before, whole = self._texts()
        self._settled = len(self._ids)
        return whole[len(before) :]

    def _texts(self) -> tuple[str, str]:
        before = self._hf.decode(self._ids[: self._settled], skip_special_tokens=False) if self._settled else ""
        return before, self._hf.decode(self._ids, skip_special_tokens=False) if self._ids else ""


def read_json_object(path: Path) -> dict[str, Any]:
    """The file's object; empty when there is no such file. Raises ``TokenizerError`` when it is malformed."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise TokenizerError(f"{path} must hold a JSON object")
    return data


def _ids(value: object) -> tuple[int, ...]:
    match value:
        case bool():
            return ()
        case int():
            return (value,)
        case list():
            return tuple(i for i in value if isinstance(i, int))
        case _:
            return ()


def _is_byte_level(hf: HfTokenizer) -> bool:
    if hf.decoder is None:
        return False
    state: Mapping[str, Any] = json.loads(hf.decoder.__getstate__())
    if state.get("type") == "Sequence":
        decoders = state.get("decoders", [])
        return len(decoders) == 1 and decoders[0].get("type") == "ByteLevel"
    return state.get("type") == "ByteLevel"


def _byte_level_table(hf: HfTokenizer) -> list[bytes]:
    """Bytes of every id, empty where the tokenizer names none."""
    vocab = hf.get_vocab(with_added_tokens=True)
    byte_of_char = _byte_of_char()
    table = [b""] * (max(vocab.values(), default=-1) + 1)
    for token, token_id in vocab.items():
        try:
            table[token_id] = bytes(byte_of_char[char] for char in token)
        except KeyError:  # an added token outside the byte alphabet stands for itself
            table[token_id] = token.encode()
    return table


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(0x100 + n): byte for n, byte in enumerate(others)})
    return table
