"""The side channel's two state machines: who does not know the key learns nothing and gets no answer."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from contextlib import suppress

import pytest

from kvtransfer.side_channel import (
    MAGIC,
    MAX_REPLY_BYTES,
    MAX_REQUEST_BYTES,
    NONCE_BYTES,
    ClientSession,
    ServerSession,
    SideChannelError,
    differences,
)

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
NONCE_C, NONCE_S = bytes(range(32)), bytes(range(32, 64))


def echo(request: bytes) -> bytes:
    return b"you said " + request


def never(request: bytes) -> bytes:
    raise AssertionError("asked by somebody who did not prove itself")


def client(key: bytes = KEY, request: bytes = b"who are you?") -> ClientSession:
    return ClientSession(key, NONCE_C, request)


def server(key: bytes = KEY, answer: Callable[[bytes], bytes] = echo) -> ServerSession:
    return ServerSession(key, NONCE_S, answer)


def talk(a: ClientSession, b: ServerSession, cut: Callable[[bytes], list[bytes]] = lambda data: [data]) -> None:
    """Carries bytes to and fro until the client is done, in pieces as ``cut`` makes them."""
    to_server = a.start()
    while not a.is_done:
        to_client = b"".join(b.feed(piece) for piece in cut(to_server))
        assert to_client, "the server waits for what the client has not got to say"
        to_server = b"".join(a.feed(piece) for piece in cut(to_client))


def test_two_that_know_the_key_ask_and_answer() -> None:
    a, b = client(), server()
    talk(a, b)
    assert a.reply == b"you said who are you?"
    assert b.is_done


def test_how_the_bytes_are_cut_on_the_way_does_not_matter() -> None:
    rng = random.Random(7)

    def cut(data: bytes) -> list[bytes]:
        places = sorted({0, len(data), *(rng.randrange(len(data) + 1) for _ in range(5))})
        return [data[a:b] for a, b in itertools.pairwise(places)]

    for _ in range(200):
        a = client(request=rng.randbytes(rng.randrange(1, 300)))
        talk(a, server(), cut)
        assert a.reply.startswith(b"you said ")
    a = client()
    talk(a, server(), lambda data: [data[i : i + 1] for i in range(len(data))])
    assert a.reply


def test_a_client_with_another_key_sends_nothing_but_its_nonce() -> None:
    a, b = client(OTHER_KEY), server(answer=never)
    hello = a.start()
    assert hello == MAGIC + NONCE_C
    with pytest.raises(SideChannelError, match="server does not know"):
        a.feed(b.feed(hello))


def test_a_client_that_only_pretends_gets_no_answer() -> None:
    b = server(answer=never)
    b.feed(MAGIC + NONCE_C)
    honest_elsewhere = client()
    frame = honest_elsewhere.feed(ServerSession(KEY, b"x" * 32, never).feed(honest_elsewhere.start()))
    with pytest.raises(SideChannelError, match="client does not know"):
        b.feed(frame)  # a request of another conversation, word for word
    assert not b.is_done


def test_a_server_cannot_be_played_by_reflecting_what_the_client_says() -> None:
    a = client()
    hello = a.start()
    with pytest.raises(SideChannelError):
        a.feed((hello[len(MAGIC) :] * 2)[: NONCE_BYTES + 32])


def test_an_answer_of_another_conversation_is_refused() -> None:
    first, second = client(), ClientSession(KEY, b"z" * 32, b"who are you?")
    b = server()
    reply = b.feed(first.feed(b.feed(first.start())))
    second.feed(server().feed(second.start()))
    with pytest.raises(SideChannelError, match="changed"):
        second.feed(reply)


def test_no_bit_of_question_or_answer_can_be_changed() -> None:
    a, b = client(), server()
    request = a.feed(b.feed(a.start()))
    for position in range(len(request)):
        listening = server(answer=never)
        listening.feed(MAGIC + NONCE_C)
        changed = bytearray(request)
        changed[position] ^= 1
        # A changed length makes the server wait for more, or refuse; it never answers.
        with suppress(SideChannelError):
            assert listening.feed(bytes(changed)) == b""
        assert not listening.is_done
    reply = b.feed(request)
    for position in range(len(reply)):
        asking = client()
        asking.feed(server().feed(asking.start()))
        changed = bytearray(reply)
        changed[position] ^= 1
        with suppress(SideChannelError):
            asking.feed(bytes(changed))
        assert not asking.is_done


def test_lengths_are_bounded_before_anything_is_kept() -> None:
    for length in (0, MAX_REQUEST_BYTES + 1, 1 << 31):
        b = server(answer=never)
        b.feed(MAGIC + NONCE_C)
        with pytest.raises(SideChannelError, match="message of"):
            b.feed(length.to_bytes(4, "big"))
    for length in (0, MAX_REPLY_BYTES + 1):
        a = client()
        a.feed(server().feed(a.start()))
        with pytest.raises(SideChannelError, match="message of"):
            a.feed(length.to_bytes(4, "big"))
    b = server(answer=never)
    b.feed(MAGIC + NONCE_C)
    with pytest.raises(SideChannelError, match="more bytes"):
        b.feed((4).to_bytes(4, "big") + bytes(100))


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1", b"\xff\x00\x00\x00", b"BKS2", b"X"])
def test_another_protocol_is_hung_up_on_at_once(said: bytes) -> None:
    with pytest.raises(SideChannelError, match="not this protocol"):
        server(answer=never).feed(said)


def test_what_differs_is_named_with_both_values() -> None:
    here = {"model": "a", "dtype": "bfloat16", "layers": "30"}
    assert differences(here, dict(here)) == ""
    assert differences(here, {**here, "dtype": "float32"}) == "dtype: bfloat16 here, float32 there"
    said = differences(here, {"model": "b", "dtype": "bfloat16", "speculation": "eagle"})
    assert said == "model: a here, b there; layers: 30 here, not said there; speculation: not said here, eagle there"
    assert len(differences({"model": "a"}, {"model": "b" * 10_000})) < 300
