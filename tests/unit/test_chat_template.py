"""Chat templates: the same text as transformers, and refusals that name the message."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

import pytest

from baton.errors import BatonError, Reason
from baton.request import ChatMessage
from router.chats.chat_template import ChatTemplate
from router.tiny_model import write_tiny_model
from router.tokenizer import Tokenizer, TokenizerError

REAL_MODEL_DIR = Path(
    os.environ.get("BATON_MODEL_DIR", Path.home() / ".cache/baton/models/smollm2-135m-instruct")
).expanduser()
needs_model = pytest.mark.skipif(not REAL_MODEL_DIR.is_dir(), reason=f"no model prepared at {REAL_MODEL_DIR}")

CONVERSATIONS = (
    [("user", "Hello!")],
    [("system", "Be brief."), ("user", "Why is the sky blue?")],
    [("user", "One."), ("assistant", "Two."), ("user", "Three: 👍 你好")],
    [("user", "  spaces \n\n and lines\n"), ("assistant", ""), ("user", "{{ 7 * 7 }} {% if x %}")],
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)


def messages(*pairs: tuple[str, str]) -> list[ChatMessage]:
    return [ChatMessage(role, content) for role, content in pairs]


@needs_model
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_text_and_ids_equal_those_of_transformers(conversation: list[tuple[str, str]]) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(str(REAL_MODEL_DIR))
    theirs = [{"role": role, "content": content} for role, content in conversation]
    template = ChatTemplate.load(REAL_MODEL_DIR)
    assert template is not None
    text = template.render(messages(*conversation), max_chars=100_000)
    assert text == reference.apply_chat_template(theirs, add_generation_prompt=True, tokenize=False)
    ids = reference.apply_chat_template(theirs, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]
    assert text is not None
    assert list(Tokenizer.load(REAL_MODEL_DIR).encode(text, add_special_tokens=False)) == list(ids)


@pytest.mark.parametrize(
    "source",
    [
        MISTRAL,
        "{%- for m in messages -%}\n  {% if loop.index > 2 %}{% break %}{% endif %}\n{{ m | tojson }}\n{%- endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{{ messages | map(attribute='content') | join('|') }}{{ tools is none }}{{ add_generation_prompt }}",
    ],
)
def test_constructs_of_known_templates_render_as_in_transformers(source: str) -> None:
    template_utils = pytest.importorskip("transformers.utils.chat_template_utils")
    conversation = [("user", "<b>'é'</b>"), ("assistant", "two"), ("user", "three")]
    theirs = [{"role": role, "content": content} for role, content in conversation]
    expected, _ = template_utils.render_jinja_template(
        [theirs], chat_template=source, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    assert template.render(messages(*conversation), max_chars=10_000) == expected[0]


def test_a_refused_role_names_the_message_and_repeats_the_templates_reason(tmp_path: Path) -> None:
    template = ChatTemplate.load(write_tiny_model(tmp_path))
    assert template is not None
    with pytest.raises(BatonError) as refused:
        template.render(messages(("user", "hi"), ("robot", "secret words"), ("user", "x")), max_chars=1000)
    assert refused.value.reason is Reason.INVALID_REQUEST
    (violation,) = refused.value.violations
    assert violation.field == "chat.messages[1]"
    assert "roles are system, user and assistant" in violation.description


def test_a_broken_order_of_roles_names_the_first_message_out_of_order() -> None:
    template = ChatTemplate(MISTRAL, {"bos_token": "<s>", "eos_token": "</s>"})
    with pytest.raises(BatonError) as refused:
        template.render(messages(("user", "a"), ("assistant", "b"), ("assistant", "c")), max_chars=1000)
    assert refused.value.violations[0].field == "chat.messages[2]"


def test_a_template_that_quotes_the_conversation_does_not_leak_it_into_the_error() -> None:
    template = ChatTemplate("{{ raise_exception('bad: ' + messages[0]['content']) }}")
    with pytest.raises(BatonError) as refused:
        template.render(messages(("user", "my secret")), max_chars=1000)
    assert "my secret" not in str(refused.value) + refused.value.violations[0].description


def test_a_template_is_repeated_only_in_its_own_words() -> None:
    template = ChatTemplate("{{ raise_exception('unexpected: ' ~ (messages[0].content | trim | upper)) }}")
    with pytest.raises(BatonError) as refused:
        template.render(messages(("user", " my secret ")), max_chars=1000)
    assert "SECRET" not in refused.value.violations[0].description
    template = ChatTemplate("{{ raise_exception('It\\'s not its turn') }}")
    with pytest.raises(BatonError) as refused:
        template.render(messages(("user", "x")), max_chars=1000)
    assert "It's not its turn" in refused.value.violations[0].description


def test_a_template_cannot_reach_python() -> None:
    template = ChatTemplate("{{ messages.__class__.__mro__ }}")
    with pytest.raises(BatonError):
        template.render(messages(("user", "x")), max_chars=1000)
    with pytest.raises(BatonError):
        ChatTemplate("{{ messages.append(1) }}").render(messages(("user", "x")), max_chars=1000)


def test_rendering_stops_at_its_bound() -> None:
    endless = ChatTemplate("{% for i in range(99999) %}{% for j in range(99999) %}0123456789{% endfor %}{% endfor %}")
    assert endless.render(messages(("user", "x")), max_chars=5000) is None


def test_strftime_now_uses_the_clock_it_was_given() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2026, 2, 3))
    assert template.render(messages(("user", "x")), max_chars=100) == "03 Feb 2026"


def test_a_model_without_a_template_has_none_and_a_broken_one_is_refused_at_load(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [{"name": "default", "template": "ok"}]}')
    loaded = ChatTemplate.load(tmp_path)
    assert loaded is not None
    assert loaded.render(messages(("user", "x")), max_chars=10) == "ok"
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(TokenizerError, match="does not compile"):
        ChatTemplate.load(tmp_path)
