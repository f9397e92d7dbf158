"""A ticket opens exactly as it was sealed, or not at all."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import BatonError, Reason
from baton.leg import pack_token_ids, unpack_token_ids
from baton.secret import SECRET_VARIABLE, cluster_token, is_cluster_token, secret_from_environment, ticket_key
from kvtransfer import ticket as ticket_module
from kvtransfer.ticket import (
    MAX_TICKET_BYTES,
    KvTicket,
    NixlParams,
    SimulatedParams,
    TransferLimits,
    open_ticket,
    prompt_digest,
    seal,
    validate_transfer_params,
)

SECRET = bytes(range(32))

NIXL: dict[str, Any] = {
    "remote_engine_id": "p0-5f3a",
    "remote_request_id": "leg-1-0a1b2c3d",
    "remote_host": "127.0.0.1",
    "remote_port": 5601,
    "remote_block_ids": [[4, 9, 2]],
    "remote_num_tokens": 300,
    "tp_size": 1,
    "dcp_size": 1,
    "pp_size": 1,
    "transfer_mode": "pull",
    "hold_slot": 3,
    "hold_nonce": (1 << 64) - 1,
}
SIMULATED: dict[str, Any] = {
    "kind": "simulated",
    "engine_id": "p0",
    "handle": "leg-1",
    "token_count": 300,
    "kv_bytes": 6_912_000,
}


def a_ticket(params: dict[str, Any] = SIMULATED) -> KvTicket:
    return KvTicket(
        ticket_id="t-1",
        worker_id="prefill-0",
        worker_epoch="e1",
        prompt_digest=prompt_digest(range(300)),
        prompt_token_count=300,
        first_token_id=77,
        lease_s=30.0,
        kv_bytes=6_912_000,
        params=validate_transfer_params(params, TransferLimits()),
    )


def refusal(data: bytes, secret: bytes = SECRET, limits: TransferLimits | None = None) -> str:
    with pytest.raises(BatonError) as caught:
        open_ticket(data, secret, limits)
    assert caught.value.reason is Reason.TICKET_REFUSED
    return caught.value.metadata["check"]


def forge(content: Any) -> bytes:
    """A correctly sealed ticket of any content: what a buggy or newer prefill worker could send."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    mac = hmac.new(ticket_key(SECRET), ticket_module.MAGIC + body, hashlib.sha256).digest()
    return ticket_module.MAGIC + mac + body


def content_of(ticket: KvTicket) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(seal(ticket, SECRET)[36:])
    return content


ids = st.from_regex(r"[A-Za-z0-9_.:-]{1,128}", fullmatch=True)
nixl_params = st.builds(
    lambda engine, request, port, blocks, slot, nonce: NixlParams(
        engine, request, "127.0.0.1", port, (tuple(blocks),), 300, 1, 1, 1, "pull", slot, nonce
    ),
    ids,
    ids,
    st.integers(1, 65535),
    st.lists(st.integers(1, 2**31 - 1), min_size=1, max_size=50, unique=True),
    st.integers(0, (1 << 16) - 1),
    st.integers(1, (1 << 64) - 1),
)
simulated_params = st.builds(SimulatedParams, ids, ids, st.just(300), st.integers(0, 2**40))
tickets = st.builds(
    KvTicket,
    ticket_id=ids,
    worker_id=ids,
    worker_epoch=ids,
    prompt_digest=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
    prompt_token_count=st.just(300),
    first_token_id=st.integers(0, 2**32 - 1),
    lease_s=st.floats(0.001, 3600, allow_nan=False),
    kv_bytes=st.integers(0, 2**40),
    params=nixl_params | simulated_params,
    tenant=st.from_regex(r"[A-Za-z0-9 _./@ä-]{0,128}", fullmatch=True),
)


@given(tickets)
def test_a_sealed_ticket_opens_as_it_was(ticket: KvTicket) -> None:
    assert open_ticket(seal(ticket, SECRET), SECRET) == ticket


@given(st.data())
def test_any_flipped_byte_is_refused(data: st.DataObject) -> None:
    sealed = bytearray(seal(a_ticket(data.draw(st.sampled_from([NIXL, SIMULATED]))), SECRET))
    sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= data.draw(st.integers(1, 255))
    assert refusal(bytes(sealed)) in {"format", "signature"}


@given(st.data())
def test_any_truncation_or_extension_is_refused(data: st.DataObject) -> None:
    sealed = seal(a_ticket(), SECRET)
    assert refusal(sealed[: data.draw(st.integers(0, len(sealed) - 1))]) in {"format", "signature"}
    assert refusal(sealed + data.draw(st.binary(min_size=1, max_size=8))) == "signature"


@given(st.binary(max_size=300))
def test_noise_is_refused(noise: bytes) -> None:
    assert refusal(noise) in {"format", "signature"}


def test_a_ticket_of_another_cluster_is_refused() -> None:
    assert refusal(seal(a_ticket(), SECRET), bytes(32)) == "signature"


def test_an_oversized_ticket_is_refused_before_it_is_hashed() -> None:
    assert refusal(ticket_module.MAGIC + bytes(MAX_TICKET_BYTES)) == "size"
    params = a_ticket(NIXL).params
    assert isinstance(params, NixlParams)
    params = replace(params, remote_block_ids=(tuple(range(2**30, 2**30 + 20_000)),))
    with pytest.raises(ValueError, match="larger than"):
        seal(replace(a_ticket(), params=params), SECRET)


def test_the_largest_legal_ticket_fits() -> None:
    blocks = [list(range(2**31 - 16_384, 2**31))]
    ticket = a_ticket({**NIXL, "remote_block_ids": blocks})
    assert open_ticket(seal(ticket, SECRET), SECRET) == ticket


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"3", {}, {"ticket_id": "t"}], ids=repr)
def test_a_seal_around_something_else_is_refused(content: Any) -> None:
    assert refusal(forge(content)) in {"format", "fields"}


def bads(key: str, *values: Any) -> list[tuple[str, Any]]:
    return [(key, value) for value in values]


MALFORMED_FIELDS: list[tuple[str, Any]] = [
    *[
        (key, bad)
        for key in ("ticket_id", "worker_id", "worker_epoch")
        for bad in ("", "a" * 129, "a b", "é", 3, None)
    ],
    *bads("prompt_digest", "", "0" * 63, "G" * 64, 1),
    *bads("prompt_token_count", 0, -1, 301, 300.0, True, "300", 2**40),
    *bads("first_token_id", -1, 2**32, 1.0, True, None),
    *bads("tenant", "x" * 129, "a\n", "a\0", 5, None),
    *bads("lease_s", 0, -1, 3601, math.inf, math.nan, True, "30"),
    *bads("kv_bytes", -1, 2**51, 1.5, False),
    *bads("params", None, [], "x", {}),
]


@pytest.mark.parametrize(("key", "bad"), MALFORMED_FIELDS, ids=lambda value: repr(value)[:20])
def test_each_malformed_field_is_refused_even_under_a_valid_seal(key: str, bad: Any) -> None:
    content = content_of(a_ticket())
    assert open_ticket(forge(content), SECRET) == a_ticket()
    assert refusal(forge({**content, key: bad})) in {"fields", "params"}


@pytest.mark.parametrize("key", sorted(content_of(a_ticket())))
def test_a_missing_or_surplus_field_is_refused(key: str) -> None:
    content = content_of(a_ticket())
    assert refusal(forge({**content, "surplus": 1})) == "fields"
    del content[key]
    assert refusal(forge(content)) == "fields"


MALFORMED_NIXL: list[tuple[str, Any]] = [
    *bads("remote_engine_id", "", "x" * 129, "a,b", "a\n", 5, None),
    *bads("remote_request_id", "", "x" * 257, "a,b", b"x", None),
    *bads("remote_host", "", "10.0.0.1", "example.com", "127.0.0.1 ", 0, None, ["127.0.0.1"]),
    *bads("remote_port", 0, 65536, -1, "5601", 1.0, True, None),
    *bads("remote_num_tokens", 0, -1, "1", 2**21, True, 299.0),
    *[(key, bad) for key in ("tp_size", "dcp_size", "pp_size") for bad in (0, 2, True, "1", None)],
    *bads("transfer_mode", "push", "", None),
    *bads("hold_slot", -1, 1 << 16, "1", 1.0, True, None),
    *bads("hold_nonce", 0, -1, 1 << 64, "1", 1.0, True, None),
    *bads(
        "remote_block_ids",
        None, [], [[]], [3], "12", [["3"]], [[0]], [[-1]], [[True]], [[1.0]], [[2**31]], [[5, 5]],
        [[1]] * 9, [list(range(1, 16_386))], {"0": [1]},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("key", "bad"), MALFORMED_NIXL, ids=lambda value: repr(value)[:20])
def test_each_malformed_nixl_field_is_refused(key: str, bad: Any) -> None:
    validate_transfer_params(NIXL, TransferLimits())
    with pytest.raises(BatonError) as caught:
        validate_transfer_params({**NIXL, key: bad}, TransferLimits())
    assert caught.value.metadata["check"] == "params"


@pytest.mark.parametrize("surplus", ["do_remote_prefill", "do_remote_decode", "_remote_blocks_processed", "x"])
def test_no_key_beside_the_known_ones_reaches_the_engine(surplus: str) -> None:
    with pytest.raises(BatonError):
        validate_transfer_params({**NIXL, surplus: True}, TransferLimits())
    for key in NIXL:
        with pytest.raises(BatonError):
            validate_transfer_params({k: v for k, v in NIXL.items() if k != key}, TransferLimits())


@given(st.dictionaries(st.sampled_from([*NIXL, "kind", "other"]), st.none() | st.integers() | st.text() | st.lists(st.integers())))  # fmt: skip # noqa: E501
def test_no_mapping_makes_validation_fail_in_any_other_way(params: dict[str, Any]) -> None:
    try:
        validate_transfer_params({**NIXL, **params}, TransferLimits())
    except BatonError as error:
        assert error.reason is Reason.TICKET_REFUSED  # noqa: PT017  passing the check is as good


@pytest.mark.parametrize("key", sorted(SIMULATED))
@pytest.mark.parametrize("bad", [None, -1, True, "é", ["x"]], ids=repr)
def test_each_malformed_simulated_field_is_refused(key: str, bad: Any) -> None:
    with pytest.raises(BatonError):
        validate_transfer_params({**SIMULATED, key: bad}, TransferLimits())


def test_blocks_must_be_exactly_those_the_tokens_need() -> None:
    limits = TransferLimits(block_token_count=128)
    assert validate_transfer_params(NIXL, limits).token_count == 300
    for blocks in ([[4, 9]], [[4, 9, 2, 3]]):
        with pytest.raises(BatonError, match="need 3"):
            validate_transfer_params({**NIXL, "remote_block_ids": blocks}, limits)


def test_hosts_beyond_loopback_are_allowed_only_by_configuration() -> None:
    params = {**NIXL, "remote_host": "10.0.0.7"}
    sealed = forge({**content_of(a_ticket()), "params": {"kind": "nixl", **params}})
    assert refusal(sealed) == "params"
    assert open_ticket(sealed, SECRET, TransferLimits(allowed_hosts=("10.0.0.7",))).worker_id == "prefill-0"


def test_vllm_gets_exactly_what_it_gave() -> None:
    params = validate_transfer_params(NIXL, TransferLimits())
    assert isinstance(params, NixlParams)
    assert params.to_vllm() == NIXL
    assert validate_transfer_params(SIMULATED, TransferLimits()).to_engine() == SIMULATED


def test_a_ticket_does_not_show_its_parameters() -> None:
    assert "127.0.0.1" not in repr(a_ticket(NIXL))


@given(st.lists(st.integers(0, 2**32 - 1), max_size=100))
def test_packed_token_ids_come_back(token_ids: list[int]) -> None:
    packed = pack_token_ids(token_ids)
    assert len(packed) == 4 * len(token_ids)
    assert unpack_token_ids(packed) == tuple(token_ids)


def test_packing_is_little_endian_and_refuses_what_does_not_fit() -> None:
    assert pack_token_ids([1, 258]) == b"\x01\0\0\0\x02\x01\0\0"
    for bad in ([-1], [2**32], ["1"]):
        with pytest.raises(ValueError):
            pack_token_ids(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="whole number"):
        unpack_token_ids(b"\0" * 5)


def test_the_secret_comes_from_the_environment_or_the_fix_is_named() -> None:
    assert secret_from_environment({SECRET_VARIABLE: SECRET.hex()}) == SECRET
    for bad, words in ({}, "not set"), ({SECRET_VARIABLE: "xy"}, "hexadecimal"), ({SECRET_VARIABLE: "00"}, "1 bytes"):
        with pytest.raises(ValueError, match=words):
            secret_from_environment(bad)


def test_only_the_exact_token_passes() -> None:
    token = cluster_token(SECRET)
    assert is_cluster_token(SECRET, token)
    for wrong in (None, "", token[:-1], token.upper(), "é", cluster_token(bytes(32)), SECRET.hex()):
        assert not is_cluster_token(SECRET, wrong)
