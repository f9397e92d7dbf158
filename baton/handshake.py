"""What gRPC's words about a failed connection say of TLS, and what to check. Pure.

gRPC has one status for all of it (UNAVAILABLE) and puts what TLS said into the text. What that text proves becomes
``HandshakeFailed``; what it only suggests becomes a hint on a lost connection, which may as well have another cause.
"""

from __future__ import annotations

import enum
import ipaddress

from baton.errors import BatonError, HandshakeFailed, Reason, StatusName

TLS_KEY = "tls"
"""Metadata of an error that TLS has to do with: which of the kinds below, or UNSURE."""
UNSURE = "unsure"
MAX_CAUSE_BYTES = 256


class Security(enum.Enum):
    """What a client speaks on its connections."""

    PLAINTEXT = "plaintext"
    TLS = "TLS"
    MUTUAL_TLS = "TLS with a client certificate"


# (what gRPC 1.80 to 1.85 says, kind, what to check). The first that fits: the later ones are more general.
_PROOFS = (
    (
        "certificate has expired",
        "expired",
        "its certificate has expired; renew it, or set this machine's clock right",
    ),
    (
        "certificate is not yet valid",
        "not_yet_valid",
        "its certificate is not valid yet; is this machine's clock right?",
    ),
    (
        "Hostname Verification Check failed",
        "wrong_name",
        "its certificate is for another name; call it by a name that the certificate has, or give that name as "
        "server_name (--tls-server-name)",
    ),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "not_trusted",
        "its certificate is of no CA that this client trusts; give the file of its CA as ca_path (--tls-ca)",
    ),
    (
        "WRONG_VERSION_NUMBER",
        "plaintext_server",
        "it does not speak TLS there; is it the right port? Without TLS whoever carries the bytes can read them",
    ),
)
_BEFORE_ANY_CALL = "failed to connect to all addresses"
_HANGS_UP = ("Socket closed", "Connection reset", "Broken pipe")
_HINTS = {
    Security.PLAINTEXT: "if it speaks TLS, give tls (--tls-ca FILE, or --tls)",
    Security.TLS: "if it asks for client certificates, give certificate_path and key_path (--tls-certificate, "
    "--tls-key)",
    Security.MUTUAL_TLS: "it may not trust the client's certificate: which CA does its tls_client_ca_path name?",
}


def tls_failure(text: str, peer: str, security: Security | None) -> BatonError | None:
    """The error that a connection's failure is, where TLS has to do with it. ``text``: gRPC's; ``peer``: the address;
    ``security``: what this side speaks, None where it is not known."""
    if _BEFORE_ANY_CALL not in text:
        return None  # a call's answer, perhaps a gateway's about its own connections: nothing is said of this one
    cause = _cause(text)
    at = f" {peer}" if peer else ""
    metadata = {"worker_id": peer, "transport": StatusName.UNAVAILABLE.value}
    for words, kind, advice in _PROOFS if security is not Security.PLAINTEXT else ():
        if words in text:
            return HandshakeFailed(
                Reason.ENGINE_FAILED,
                StatusName.UNAVAILABLE,
                f"no TLS with the server{at}: {advice} ({cause})",
                metadata={**metadata, TLS_KEY: kind},
            )
    if security is None:
        return None
    if any(words in text for words in _HANGS_UP):
        hint = f"the server{at} hung up before any call; {_HINTS[security]}"
    elif security is not Security.PLAINTEXT and _is_name(peer):
        hint = (
            f"no server answers at {peer}, or TLS with it fails: of a name's several addresses gRPC tells what one "
            "said; ask by IP address, with server_name (--tls-server-name), to hear the others"
        )
    else:
        return None
    return BatonError(
        Reason.ENGINE_FAILED, StatusName.UNAVAILABLE, f"{hint} ({cause})", metadata={**metadata, TLS_KEY: UNSURE}
    )


def _is_name(address: str) -> bool:
    try:
        ipaddress.ip_address(address.rpartition(":")[0].strip("[]"))
    except ValueError:
        return True
    return False


def _cause(text: str) -> str:
    """Its end has what TLS said."""
    return text.rpartition("last error: ")[2].encode()[:MAX_CAUSE_BYTES].decode(errors="ignore")
