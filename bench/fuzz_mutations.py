"""Requests gone wrong, from the descriptors of the public API and a number: the same number, the same bytes.

Pure. A case is a valid request of one public method, with some of its fields set to what stands at or beyond a
border, with members of oneofs exchanged, lists emptied, doubled or blown up, texts of every unpleasant kind; and,
now and then, with its bytes cut, flipped, doubled or replaced. How the caller behaves (its deadline, when it leaves,
whether it reads) is part of the case.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from baton.v1 import generation_pb2 as pb
from baton.v1 import model_pb2 as models
from baton.v1 import status_pb2 as status

WATCHWORD = "Zq7yonder"
"""In every prompt of the corpus: what must not be found in any error."""
GENERATE = "/baton.v1.GenerationService/Generate"
RESUME = "/baton.v1.GenerationService/ResumeGenerate"
CANCEL = "/baton.v1.GenerationService/CancelGeneration"

METHODS: dict[str, Any] = {
    f"/{service.full_name}/{method.name}": method
    for file in (pb, models, status)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
WATCH = "/baton.v1.StatusService/WatchStatus"
WEIGHTS = {GENERATE: 10, RESUME: 4, CANCEL: 1}
"""Of the methods; every other one has 1."""

_INTS = sorted({
    *(sign * number for number in (0, 1, 2, 3, 15, 16, 17, 19, 20, 21, 63, 64, 65, 99, 100, 101, 127, 128, 129, 255,
      256, 257, 362, 363, 1023, 1024, 1025, 2047, 2048, 49_151, 49_152, 100_000, 2**31 - 1) for sign in (1, -1)),
    -(2**31),
})  # fmt: skip
_LONGS = sorted({*_INTS, 2**31, 2**32, 2**53, 2**63 - 1, 2**63 - 2, -(2**63), 315_576_000_000, -315_576_000_001})
_DOUBLES = (0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5, 1e-9, 5e-324, 0.01, 0.0099, 100.0, -100.0, 100.0001, 2.0000001,
            1.0000001, 1e308, -1e308, 1e300, math.nan, math.inf, -math.inf)  # fmt: skip
_TEXTS = ("", " ", "\0", "a", "\n" * 9, "\u202e\u0000\uffff", "🙂" * 40, "é" * 65, "a" * 64, "a" * 65, "a" * 128,
          "a" * 129, "a" * 256, "a" * 257, "tiny", "user", "assistant", "system", "tool", "{{ messages }}",
          "{% for x in y %}",
          "../../etc/passwd", "%s%n", "<|im_end|>", "<|im_start|>", "<tool_call>{", "</think>", "not/this", "blue",
          "Once upon a time ")  # fmt: skip
_REGEXES = ("(a+)+$", "(" * 40, "[" * 40, "a{1000}{1000}", "(a|b|)*", "\\", "[a-", "(?=x)", "(?<!x)y", "\\p{L}+",
            ".*", "x{2147483648}", "(((((((((a?){9}){9}){9}){9}){9}){9}){9}){9}){9}", "a" * 9000)  # fmt: skip
_GRAMMARS = (
    "start: start",
    'start: "a" | start "b"',
    "root ::= root",
    'root ::= "x"',
    "start: /(a+)+/",
    "start:",
    "?",
)


@dataclass(frozen=True, slots=True)
class Case:
    """One call. Equal numbers and seeds give equal cases."""

    number: int
    path: str
    data: bytes = field(repr=False)
    timeout_s: float | None
    cancel_after_s: float | None
    """The caller leaves so long after it came; None: it stays."""
    cancel_after_message_count: int | None
    does_read: bool
    """False: it reads one message and then none until its deadline."""
    is_parsed: bool
    """The bytes are a message of the method."""
    prelude: bytes | None = field(default=None, repr=False)
    """A Generate request to send first and to leave after its first messages: its resume token then replaces
    TOKEN_MARK in ``data``."""
    spoils_token: bool = False
    """One character of that token is exchanged first."""


TOKEN_MARK = "~" * 64
"""Stands in ``data`` for a resume token that only the call before can give."""


def case_of(number: int, seed: int, *, longest_list: int = 3000, huge_list: int = 400_000) -> Case:
    """``huge_list``: elements that a list is blown up to, one time in 4000."""
    rng = random.Random(f"{seed}/{number}")  # noqa: S311  # reproducible on purpose
    paths = list(METHODS)
    path = rng.choices(paths, [WEIGHTS.get(each, 1) for each in paths])[0]
    message = _copied(rng.choice(CORPUS[path]))
    prelude = None
    if path in (RESUME, CANCEL) and rng.random() < 0.6:
        prelude = rng.choice(_PRELUDES).SerializeToString()
        message.resume_token = TOKEN_MARK
        if path == RESUME:
            message.next_token_index = rng.choice((0, 0, 1, 2, 3))
    kept_token = getattr(message, "resume_token", "")
    changer = _Changer(rng, longest_list)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3, 5, 9))):
        changer.change(message, 0)
    if rng.random() < 0.00025:
        changer.blow_up(message, huge_list)
    if prelude is not None and rng.random() < 0.9:
        message.resume_token = kept_token
    data = message.SerializeToString()
    is_parsed = True
    if rng.random() < 0.12:
        data = _garbled(data, rng)
        is_parsed = _parses(path, data)
    timeout_s = rng.choices((10.0, 2.0, 0.05, 0.005, 0.0005, None), (70, 10, 6, 6, 3, 5))[0]
    if path == WATCH:
        timeout_s = min(timeout_s or 0.05, 0.05)  # it has no other end
    leaves = rng.random()
    return Case(
        number,
        path,
        data,
        timeout_s,
        cancel_after_s=rng.choice((0.0, 0.0, 0.0005, 0.002, 0.01)) if leaves < 0.12 else None,
        cancel_after_message_count=rng.choice((0, 1, 1, 2, 3, 5)) if 0.12 <= leaves < 0.22 else None,
        does_read=timeout_s is None or timeout_s > 2.0 or rng.random() > 0.05,
        is_parsed=is_parsed,
        prelude=prelude,
        spoils_token=prelude is not None and rng.random() < 0.15,
    )


class _Changer:
    def __init__(self, rng: random.Random, longest_list: int) -> None:
        self._rng = rng
        self._longest_list = longest_list

    def change(self, message: Message, depth: int) -> None:
        """One change somewhere in ``message``: at a field that is set, mostly, else at any."""
        rng = self._rng
        fields = list(message.DESCRIPTOR.fields)
        if not fields:
            return
        there = [each for each, _ in message.ListFields()]
        chosen: Any = rng.choice(there) if there and rng.random() < 0.6 else rng.choice(fields)
        if chosen.is_repeated:
            self._change_list(message, chosen, depth)
        elif chosen.message_type is not None:
            part = getattr(message, chosen.name)
            kind = rng.random()
            if kind < 0.08:
                message.ClearField(chosen.name)
            elif kind < 0.16:
                part.Clear()
                part.SetInParent()
            else:
                part.SetInParent()
                self.change(part, depth + 1)
        elif rng.random() < 0.05:
            message.ClearField(chosen.name)
        else:
            setattr(message, chosen.name, self._value(chosen))

    def _change_list(self, message: Message, chosen: FieldDescriptor, depth: int) -> None:
        rng = self._rng
        items: Any = getattr(message, chosen.name)
        kind = rng.random()
        if chosen.message_type is not None:
            if kind < 0.55 and items:
                self.change(rng.choice(items), depth + 1)
            elif kind < 0.65:
                del items[:]
            elif kind < 0.72:
                for _ in range(self._count()):
                    items.add()
            else:
                added = items.add()
                if len(items) > 1 and rng.random() < 0.5:
                    added.CopyFrom(items[rng.randrange(len(items) - 1)])
                self.change(added, depth + 1)
            if len(items) and rng.random() < 0.04:
                for _ in range(min(self._count(), 300)):
                    items.add().CopyFrom(items[0])
            return
        if kind < 0.15:
            del items[:]
        elif kind < 0.45 and items:
            items[rng.randrange(len(items))] = self._value(chosen)
        elif kind < 0.6:
            items.extend([self._value(chosen)] * self._count())
        elif kind < 0.7 and items:
            items.extend(list(items))
        else:
            items.append(self._value(chosen))

    def blow_up(self, message: Message, count: int) -> None:
        """One list anywhere in ``message``, to ``count`` elements of nothing or next to nothing."""
        rng = self._rng
        for _ in range(6):
            fields = [each for each in message.DESCRIPTOR.fields if each.is_repeated or each.message_type]
            if not fields:
                return
            chosen: Any = rng.choice(fields)
            part: Any = getattr(message, chosen.name)
            if not chosen.is_repeated:
                part.SetInParent()
                message = part
            elif chosen.message_type is None:
                part.extend(["" if chosen.type == FieldDescriptor.TYPE_STRING else 5] * count)
                return
            elif rng.random() < 0.6 or not part:
                part.MergeFrom([message_factory.GetMessageClass(chosen.message_type)()] * count)
                return
            else:
                message = part[0]

    def _count(self) -> int:
        return self._rng.choice((1, 2, 15, 16, 17, 64, 65, 128, 129, 256, 257, 1024, 1025, self._longest_list))

    def _value(self, chosen: FieldDescriptor) -> Any:
        rng = self._rng
        match chosen.type:
            case FieldDescriptor.TYPE_BOOL:
                return rng.random() < 0.5
            case FieldDescriptor.TYPE_DOUBLE:
                return rng.choice(_DOUBLES)
            case FieldDescriptor.TYPE_INT32:
                return rng.choice(_INTS)
            case FieldDescriptor.TYPE_INT64:
                return rng.choice(_LONGS)
            case FieldDescriptor.TYPE_ENUM:
                assert chosen.enum_type is not None
                return rng.choice([*(each.number for each in chosen.enum_type.values), -1, 99, 2**31 - 1, -(2**31)])
            case FieldDescriptor.TYPE_STRING:
                return self._text(chosen.name)
            case FieldDescriptor.TYPE_BYTES:
                return rng.randbytes(rng.choice((0, 1, 16, 1000)))
        raise AssertionError(f"no values for {chosen.full_name}: a new kind of field")

    def _text(self, name: str) -> str:
        rng = self._rng
        kind = rng.random()
        if "json" in name and kind < 0.75:
            return odd_json(rng)
        if name == "regex" and kind < 0.75:
            return rng.choice(_REGEXES)
        if name == "grammar" and kind < 0.75:
            return rng.choice(_GRAMMARS)
        if kind > 0.985:
            return rng.choice(("a", "é", " ", "\n", "{", "ab ")) * rng.choice((4096, 4097, 9000, 65_536, 65_537))
        return rng.choice(_TEXTS)


def odd_json(rng: random.Random) -> str:
    """JSON that is strange, too deep, too large, of another type than wanted, or none."""
    leaf: Callable[[], Any] = lambda: rng.choice(  # noqa: E731  # one place needs it
        [None, True, 0, -1, 1e308, 10**30, "", "text", "\ud800", "é\0", [], {}, "{{ x }}", 2**63]
    )
    match rng.randrange(14):
        case 0:
            return "[" * rng.choice((5, 33, 500, 20_000))
        case 1:
            depth = rng.choice((5, 31, 33, 64, 200, 900))
            return '{"properties":{"a":' * depth + "{}" + "}}" * depth
        case 2:
            depth = rng.choice((5, 33, 500, 20_000))
            return '{"a":' * depth + "1" + "}" * depth
        case 3:
            return rng.choice(("NaN", "Infinity", "-Infinity", '{"a":NaN}', '{"minItems":Infinity}', "1e999", "nul"))
        case 4:
            return '{"a":' + "9" * rng.choice((20, 400, 5000)) + "}"
        case 5:
            return '{"a":1,"a":2,"a":{"a":[]}}'
        case 6:
            return json.dumps({f"k{index}": leaf() for index in range(rng.choice((1, 65, 700)))})
        case 7:
            return json.dumps({"type": rng.choice(("object", "array", "nonsense", 5, None, ["string", "null"]))})
        case 8:
            counts = {key: rng.choice((0, -1, 1e9, 10_001, True, "5")) for key in ("minItems", "maxLength")}
            return json.dumps({"type": "array", "items": {"type": "string"}, **counts})
        case 9:
            return json.dumps({"$ref": rng.choice(("#", "#/$defs/a", "http://nowhere/x", "")), "$defs": {"a": {}}})
        case 10:
            return json.dumps({"enable_thinking": leaf(), "tone": leaf(), "date": leaf()})
        case 11:
            return json.dumps({"type": "object", "properties": {"a": {"pattern": rng.choice(_REGEXES)}}})
        case 12:
            return rng.choice(('{"a":"\\ud800"}', '{"\\ud800":1}', '{"enable_thinking":"\\udfff"}', "[]", '""', "5"))
    return json.dumps({"anyOf": [{"const": leaf()}] * rng.choice((1, 3, 300)), "enum": [leaf(), leaf()]})


def _garbled(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    match rng.randrange(10):
        case 0:
            return data[:at]
        case 1:
            return data[at:]
        case 2:
            return data + data  # every field twice: lists double, the last scalar and oneof win
        case 3:
            return data + rng.randbytes(rng.choice((1, 4, 40)))
        case 4:
            return rng.randbytes(rng.choice((0, 1, 2, 8, 64, 1000)))
        case 5 if data:
            flipped = bytearray(data)
            for _ in range(rng.choice((1, 1, 2, 8))):
                flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            return bytes(flipped)
        case 6:
            return data[:at] + rng.randbytes(rng.choice((1, 2, 9))) + data[at:]
        case 7:
            return data + _tag(rng.randrange(14, 20_000), 2) + b"\x05hello"  # a field nobody knows
        case 8:
            depth = rng.choice((5, 99, 101, 5000))
            return data + _tag(900, 3) * depth + _tag(900, 4) * depth  # groups in groups
        case 9:
            other = rng.choice(CORPUS[rng.choice(list(METHODS))]).SerializeToString()
            return data + other  # another message on top: members of oneofs meet
    return data


def _tag(number: int, wire_type: int) -> bytes:
    value, out = number << 3 | wire_type, bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _parses(path: str, data: bytes) -> bool:
    try:
        message_factory.GetMessageClass(METHODS[path].input_type).FromString(data)
    except Exception:  # DecodeError, whatever protobuf's flavour calls it
        return False
    return True


def _copied(message: Message) -> Any:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


def _generate_requests() -> Sequence[pb.GenerateRequest]:
    text = f"{WATCHWORD} Once upon a time"
    few = pb.StopConditions(max_output_token_count=4)
    chat = pb.Chat(
        messages=[
            pb.ChatMessage(role="system", content=WATCHWORD),
            pb.ChatMessage(role="user", content=f"{WATCHWORD} hello", name="ann"),
        ]
    )
    tools = pb.Chat(
        messages=[
            *chat.messages,
            pb.ChatMessage(
                role="assistant",
                reasoning=WATCHWORD,
                tool_calls=[pb.ToolCall(id="call-1", name="look_up", arguments_json='{"what": "x"}')],
            ),
            pb.ChatMessage(role="tool", content=WATCHWORD, tool_call_id="call-1"),
        ],
        tools=[
            pb.Tool(
                name="look_up",
                description=WATCHWORD,
                parameters_json_schema='{"type":"object","properties":{"what":{"type":"string"}}}',
            )
        ],
        tool_choice=pb.ToolChoice(mode=pb.ToolChoice.MODE_AUTO),
        template_arguments_json='{"enable_thinking": false}',
    )
    every = pb.Sampling(
        temperature=0.7,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        seed=17,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.25,
        logit_bias=[pb.TokenBias(token_id=3, bias=2.5), pb.TokenBias(token_id=4, bias=-100)],
        allowed_token_ids=pb.TokenIds(ids=range(3, 200)),
        bad_token_sequences=[pb.TokenIds(ids=[5]), pb.TokenIds(ids=[6, 7])],
    )
    structures = [
        pb.StructuredOutput(json_schema='{"type":"object","properties":{"a":{"type":"string"}}}'),
        pb.StructuredOutput(json_object=pb.JsonObject()),
        pb.StructuredOutput(regex="[a-z]{1,8}"),
        pb.StructuredOutput(choice=pb.Choices(texts=["yes", "no"])),
        pb.StructuredOutput(grammar='start: "a" | "b"'),
    ]
    resume = pb.ResumeOptions()
    resume.grace.FromMilliseconds(200)
    requests = [
        pb.GenerateRequest(text=text, stop=few),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=range(3, 40)), stop=few, model="tiny"),
        pb.GenerateRequest(chat=chat, stop=few),
        pb.GenerateRequest(chat=tools, stop=few),
        pb.GenerateRequest(text=text, sampling=every, stop=few, tenant="blue", session_id="s1", correlation_id="c1"),
        pb.GenerateRequest(
            text=text,
            stop=pb.StopConditions(
                max_output_token_count=12,
                min_output_token_count=2,
                stop_sequences=["the end", "."],
                stop_token_ids=[2, 9],
                ignore_eos=True,
            ),
            output=pb.OutputOptions(content=pb.OutputOptions.CONTENT_BOTH, top_logprob_count=2),
            priority=5,
        ),
        pb.GenerateRequest(
            text=text,
            stop=few,
            output=pb.OutputOptions(
                content=pb.OutputOptions.CONTENT_TOKEN_IDS,
                max_chunk_token_count=1,
                echo_prompt=True,
                prompt_logprob_count=1,
            ),
        ),
        pb.GenerateRequest(text=text, stop=few, sampling=pb.Sampling(temperature=1, seed=3), sample_count=3),
        pb.GenerateRequest(
            text=text,
            stop=few,
            resume=resume,
            output=pb.OutputOptions(content=pb.OutputOptions.CONTENT_BOTH),
        ),
    ]
    return [*requests, *(pb.GenerateRequest(text=text, stop=few, sampling=pb.Sampling(structure=each))
                         for each in structures)]  # fmt: skip


_GENERATE_REQUESTS = _generate_requests()
_PRELUDES = [each for each in _GENERATE_REQUESTS if each.HasField("resume")]
_CHATS = [each.chat for each in _GENERATE_REQUESTS if each.HasField("chat")]

CORPUS: dict[str, Sequence[Message]] = {
    GENERATE: _GENERATE_REQUESTS,
    RESUME: [
        pb.ResumeGenerateRequest(resume_token="not-a-token", next_token_index=2),  # noqa: S106
        *(
            pb.ResumeGenerateRequest(
                resume_token="x",  # noqa: S106
                next_token_index=2,
                continuation=pb.Continuation(request=each, samples=[pb.TokenIds(ids=[7, 8])]),
            )
            for each in _PRELUDES
        ),
        pb.ResumeGenerateRequest(resume_token="x", next_token_indices=[1, 2, 3], tenant="blue"),  # noqa: S106
    ],
    CANCEL: [
        pb.CancelGenerationRequest(resume_token="not-a-token"),  # noqa: S106
        pb.CancelGenerationRequest(tenant="blue"),
    ],
    WATCH: [status.WatchStatusRequest()],
    "/baton.v1.ModelService/ListModels": [models.ListModelsRequest()],
    "/baton.v1.ModelService/GetModel": [models.GetModelRequest(name="tiny"), models.GetModelRequest()],
    "/baton.v1.ModelService/CountTokens": [
        models.CountTokensRequest(text=WATCHWORD),
        *(models.CountTokensRequest(model="tiny", chat=each) for each in _CHATS),
    ],
    "/baton.v1.ModelService/Tokenize": [
        models.TokenizeRequest(text=WATCHWORD, add_special_tokens=False),
        *(models.TokenizeRequest(chat=each) for each in _CHATS),
    ],
    "/baton.v1.ModelService/Detokenize": [
        models.DetokenizeRequest(token_ids=pb.TokenIds(ids=range(3, 60)), keep_special_tokens=True)
    ],
}
"""Valid requests of every public method: where cases begin. A method without one fails at once, by its path."""
