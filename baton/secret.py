"""The cluster's secret: where it comes from and what is made of it.

One 32-byte secret per cluster, handed to every process in an environment variable. Nothing sends it: callers of
internal methods present a token derived from it, and KV tickets are sealed with a key derived from it. Never
logged, never in a ``repr``.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping

SECRET_VARIABLE = "BATON_CLUSTER_SECRET"  # noqa: S105  the variable's name
SECRET_BYTES = 32
TOKEN_KEY = "baton-cluster-token"  # noqa: S105  the metadata key's name
"""gRPC metadata key under which internal calls carry ``cluster_token(secret)``."""


def new_secret() -> bytes:
    return secrets.token_bytes(SECRET_BYTES)


def secret_from_environment(environment: Mapping[str, str]) -> bytes:
    """Reads the secret. Raises ``ValueError``, naming the variable and the fix, when it is missing or malformed."""
    text = environment.get(SECRET_VARIABLE, "")
    how = "make one with: python -c 'import secrets; print(secrets.token_hex(32))'"
    if not text:
        raise ValueError(f"{SECRET_VARIABLE} is not set; every process of a cluster needs the same one ({how})")
    try:
        secret = bytes.fromhex(text)
    except ValueError:
        raise ValueError(f"{SECRET_VARIABLE} is not hexadecimal; {how}") from None
    return checked_secret(secret)


def checked_secret(secret: bytes) -> bytes:
    """Returns ``secret``; raises ``ValueError`` unless it has 32 bytes."""
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"the cluster secret has {len(secret)} bytes and must have {SECRET_BYTES}")
    return secret


def cluster_token(secret: bytes) -> str:
    """What an internal call carries in its metadata: proves the secret without sending it."""
    return _derived(secret, b"baton-internal").hex()


def is_cluster_token(secret: bytes, token: str | bytes | None) -> bool:
    """Compares in constant time. ``token`` is whatever the caller sent, or None."""
    sent = token.encode() if isinstance(token, str) else token or b""
    return hmac.compare_digest(sent, cluster_token(secret).encode())


def ticket_key(secret: bytes) -> bytes:
    """The key KV tickets are sealed with."""
    return _derived(secret, b"baton-ticket")


def peer_key(secret: bytes) -> bytes:
    """The key that an engine's coordinates are sealed with."""
    return _derived(secret, b"baton-peer")


def side_channel_key(secret: bytes) -> bytes:
    """The key with which engines prove to one another that they are of one cluster. An engine process gets this one
    and not the secret."""
    return _derived(secret, b"baton-side-channel")


def resume_key(secret: bytes) -> bytes:
    """The key resume tokens are sealed with."""
    return _derived(secret, b"baton-resume")


def _derived(secret: bytes, purpose: bytes) -> bytes:
    return hmac.new(checked_secret(secret), purpose, hashlib.sha256).digest()
