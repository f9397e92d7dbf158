"""The KV ticket: the right to pull one request's KV, sealed so that only this cluster can have made it.

A prefill worker seals; the router carries the bytes and cannot read more than it needs to; a decode worker opens.
Pure: no I/O and no clock. Whether a ticket was used before, or its lease ended, is not known here: see
``decode_worker/worker.py`` and ``kvtransfer/ledger.py``.

    "BKT2" | HMAC-SHA256 of the body, 32 bytes | canonical JSON body
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from baton.errors import BatonError, ticket_refused
from baton.leg import pack_token_ids
from baton.request import MAX_TENANT_BYTES
from baton.secret import ticket_key
from kvtransfer.transfer_params import (
    LOOPBACK_HOSTS,
    NixlParams,
    SimulatedParams,
    TransferLimits,
    TransferParams,
    validate_transfer_params,
)

__all__ = [
    "LOOPBACK_HOSTS",
    "MAX_TICKET_BYTES",
    "KvTicket",
    "NixlParams",
    "SimulatedParams",
    "TransferLimits",
    "TransferParams",
    "open_ticket",
    "prompt_digest",
    "seal",
    "validate_transfer_params",
]

MAGIC = b"BKT2"
MAX_TICKET_BYTES = 192 * 1024
"""Room for 16,384 block ids of ten digits."""
MAX_LEASE_S = 3600.0

_MAC_BYTES = hashlib.sha256().digest_size
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TENANT = re.compile(rf"[^\x00-\x1f\x7f]{{0,{MAX_TENANT_BYTES}}}")
_MAX_TOKEN_ID = (1 << 32) - 1
_MAX_KV_BYTES = 1 << 50
_BODY_KEYS = frozenset(
    {
        "ticket_id",
        "worker_id",
        "worker_epoch",
        "prompt_digest",
        "prompt_token_count",
        "first_token_id",
        "tenant",
        "lease_s",
        "kv_bytes",
        "params",
    }
)


@dataclass(frozen=True, slots=True)
class KvTicket:
    """What a prefill worker vouches for."""

    ticket_id: str
    worker_id: str
    worker_epoch: str
    prompt_digest: str
    """``prompt_digest`` of the prefilled prompt: the KV belongs to these tokens and no others."""
    prompt_token_count: int
    first_token_id: int
    """Sampled by the prefill; the decode continues from prompt + this."""
    lease_s: float
    """A duration from the reply, not an instant: clocks of two machines differ."""
    kv_bytes: int
    params: TransferParams = field(repr=False)
    tenant: str = ""
    """Whose prompt it was: nobody else's request continues from this KV."""


def prompt_digest(prompt_token_ids: Sequence[int]) -> str:
    """SHA-256, hexadecimal, of the packed prompt."""
    return hashlib.sha256(pack_token_ids(prompt_token_ids)).hexdigest()


def seal(ticket: KvTicket, secret: bytes) -> bytes:
    """The ticket as bytes. Raises ``ValueError`` if it would not open again: a bug of the sealer."""
    body = json.dumps(
        {
            "ticket_id": ticket.ticket_id,
            "worker_id": ticket.worker_id,
            "worker_epoch": ticket.worker_epoch,
            "prompt_digest": ticket.prompt_digest,
            "prompt_token_count": ticket.prompt_token_count,
            "first_token_id": ticket.first_token_id,
            "tenant": ticket.tenant,
            "lease_s": ticket.lease_s,
            "kv_bytes": ticket.kv_bytes,
            "params": ticket.params.to_wire(),
        },
        sort_keys=True,
        separators=(",", ":"),
        allow_nan=False,
    ).encode()
    data = MAGIC + _mac(body, secret) + body
    if len(data) > MAX_TICKET_BYTES:
        raise ValueError(f"a ticket of {len(data)} bytes is larger than {MAX_TICKET_BYTES}")
    return data


def open_ticket(data: bytes, secret: bytes, limits: TransferLimits | None = None) -> KvTicket:
    """The ticket in ``data``. Raises TICKET_REFUSED, with the check that failed in the metadata:

    ``size``, ``format`` (not a ticket), ``signature`` (forged, damaged or another cluster's), ``fields``,
    ``params``. Nothing is parsed before the signature is verified.
    """
    if len(data) > MAX_TICKET_BYTES:
        raise ticket_refused("size", f"more than {MAX_TICKET_BYTES} bytes")
    if len(data) <= len(MAGIC) + _MAC_BYTES or not data.startswith(MAGIC):
        raise ticket_refused("format")
    sent, body = data[len(MAGIC) : len(MAGIC) + _MAC_BYTES], data[len(MAGIC) + _MAC_BYTES :]
    if not hmac.compare_digest(sent, _mac(body, secret)):
        raise ticket_refused("signature")
    try:
        content = json.loads(body)
    except ValueError:
        raise ticket_refused("format") from None
    return _ticket(content, limits or TransferLimits())


def _mac(body: bytes, secret: bytes) -> bytes:
    return hmac.new(ticket_key(secret), MAGIC + body, hashlib.sha256).digest()


def _ticket(content: Any, limits: TransferLimits) -> KvTicket:
    # The seal says who made it, not that the maker is of this version or free of bugs.
    if not isinstance(content, dict) or content.keys() != _BODY_KEYS:
        raise ticket_refused("fields", "not the fields of a ticket")
    params = validate_transfer_params(content["params"], limits)
    if "kind" not in content["params"]:
        raise ticket_refused("params", "kind is missing")
    ticket = KvTicket(
        ticket_id=_text(content, "ticket_id", _ID),
        worker_id=_text(content, "worker_id", _ID),
        worker_epoch=_text(content, "worker_epoch", _ID),
        prompt_digest=_text(content, "prompt_digest", _DIGEST),
        prompt_token_count=_integer(content, "prompt_token_count", 1, limits.max_token_count),
        first_token_id=_integer(content, "first_token_id", 0, _MAX_TOKEN_ID),
        lease_s=_lease(content),
        kv_bytes=_integer(content, "kv_bytes", 0, _MAX_KV_BYTES),
        params=params,
        tenant=_text(content, "tenant", _TENANT),
    )
    if params.token_count != ticket.prompt_token_count:
        raise ticket_refused("params", "the KV held is not that of the whole prompt")
    return ticket


def _integer(content: dict[str, Any], key: str, least: int, most: int) -> int:
    value = content[key]
    if type(value) is not int or not least <= value <= most:
        raise _malformed(key)
    return value


def _text(content: dict[str, Any], key: str, pattern: re.Pattern[str]) -> str:
    value = content[key]
    if type(value) is not str or not pattern.fullmatch(value):
        raise _malformed(key)
    return value


def _lease(content: dict[str, Any]) -> float:
    value = content["lease_s"]
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 < value <= MAX_LEASE_S:
        raise _malformed("lease_s")
    return float(value)


def _malformed(key: str) -> BatonError:
    return ticket_refused("fields", f"{key} is malformed")
