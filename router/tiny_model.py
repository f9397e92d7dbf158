"""A model directory without weights: a small byte-level tokenizer and a ChatML template, made in milliseconds.

For tests, and for fleets of simulated engines on machines where no model was prepared. Its tokenizer behaves like
a real one: every text has an encoding, an emoji takes several tokens, words take a leading space.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

END_OF_TEXT_ID, START_ID, END_ID = 0, 1, 2

_CORPUS = (
    "Once upon a time there was a small model that told the time of every phase.",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "A router sends a prompt to a worker, the worker sends tokens back to the router.",
)

CHAT_TEMPLATE = """\
{% for message in messages %}
{% if message['role'] not in ('system', 'user', 'assistant') %}
{{ raise_exception('roles are system, user and assistant') }}
{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' -}}
{% endif %}
"""


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE of some 360 tokens; ids 0, 1, 2 are special, 2 ends an answer."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(name, special=True) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def write_tiny_model(directory: Path, *, max_context_token_count: int = 2048) -> Path:
    """Writes tokenizer.json, config.json, generation_config.json, tokenizer_config.json and chat_template.jinja
    into ``directory``, made if need be, and returns it."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    vocab_size = tokenizer.get_vocab_size()
    config = {"vocab_size": vocab_size, "max_position_embeddings": max_context_token_count, "eos_token_id": END_ID}
    tokens = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
    }
    for name, content in (
        ("config.json", config),
        ("generation_config.json", {"eos_token_id": [END_ID]}),
        ("tokenizer_config.json", tokens),
    ):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return directory
