"""The resume token: the right to go on with one generation, sealed so that any router of the cluster can check it.

Pure: the time is passed in. It names no prompt and no token of an answer; of the request it has a digest, so that a
continuation is the request that was asked and no other. What runs where is not in it: a router that does not know
the generation has only the continuation to go by.

    "brt1." | base64url without padding of: HMAC-SHA256 of the body, 32 bytes | canonical JSON body
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import math
import re
from dataclasses import dataclass
from typing import Any

from baton.errors import BatonError, resume_denied
from baton.secret import resume_key

MAX_TOKEN_BYTES = 2048

_PREFIX = "brt1."
_MAC_BYTES = hashlib.sha256().digest_size
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_IDENTITY_LENGTH = 256
_MAX_TIME_S = 1e11


@dataclass(frozen=True, slots=True)
class ResumeClaim:
    """What a token says. Times are seconds since 1970: they are read on other machines."""

    generation_id: str
    identity: str
    """Whose it is: see ``callers.Caller.identity``."""
    request_digest: str
    """SHA-256, hexadecimal, of the request that began the generation."""
    issued_at: float
    deadline_at: float
    """Of the generation: a continuation elsewhere has no more time than the original call had."""
    expires_at: float
    """Nothing of the generation is anywhere after it."""

    def is_over(self, now: float) -> bool:
        return now >= self.expires_at


def seal_claim(claim: ResumeClaim, secret: bytes) -> str:
    """The claim as a token. Raises ``ValueError`` if it would not open again: a bug of the sealer."""
    body = json.dumps(
        {
            "generation_id": claim.generation_id,
            "identity": claim.identity,
            "request_digest": claim.request_digest,
            "issued_at": claim.issued_at,
            "deadline_at": claim.deadline_at,
            "expires_at": claim.expires_at,
        },
        sort_keys=True,
        separators=(",", ":"),
        allow_nan=False,
    ).encode()
    token = _PREFIX + base64.urlsafe_b64encode(_mac(body, secret) + body).rstrip(b"=").decode()
    try:
        opened = open_claim(token, secret)
    except BatonError as error:
        raise ValueError("a resume token would not open again") from error
    if opened != claim:
        raise ValueError("a resume token would say something else")
    return token


def open_claim(token: str, secret: bytes) -> ResumeClaim:
    """The claim of a token that this cluster made. Raises RESUME_DENIED, one text for every cause; whether it is over
    is the caller's question. Nothing is parsed before the seal is verified."""
    if len(token) > MAX_TOKEN_BYTES or not token.startswith(_PREFIX):
        raise resume_denied()
    encoded = token[len(_PREFIX) :]
    try:
        data = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars="-_", validate=True)
    except (binascii.Error, ValueError):
        raise resume_denied() from None
    sent, body = data[:_MAC_BYTES], data[_MAC_BYTES:]
    if not hmac.compare_digest(sent, _mac(body, secret)):
        raise resume_denied()
    return _claim(body)


def _mac(body: bytes, secret: bytes) -> bytes:
    return hmac.new(resume_key(secret), _PREFIX.encode() + body, hashlib.sha256).digest()


def _claim(body: bytes) -> ResumeClaim:
    # The seal says who made it, not that the maker is of this version or free of bugs.
    try:
        content = json.loads(body)
    except ValueError:
        raise resume_denied() from None
    if not isinstance(content, dict) or content.keys() != set(ResumeClaim.__slots__):
        raise resume_denied()
    identity = content["identity"]
    if type(identity) is not str or len(identity) > _MAX_IDENTITY_LENGTH:
        raise resume_denied()
    return ResumeClaim(
        generation_id=_text(content["generation_id"], _ID),
        identity=identity,
        request_digest=_text(content["request_digest"], _DIGEST),
        issued_at=_time(content["issued_at"]),
        deadline_at=_time(content["deadline_at"]),
        expires_at=_time(content["expires_at"]),
    )


def _text(value: Any, pattern: re.Pattern[str]) -> str:
    if type(value) is not str or not pattern.fullmatch(value):
        raise resume_denied()
    return value


def _time(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 <= value <= _MAX_TIME_S:
        raise resume_denied()
    return float(value)
