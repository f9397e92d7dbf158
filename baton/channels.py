"""How Baton's channels are set up: retries, keepalive, proxies, credentials. No call is made here."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Sequence
from typing import Any

DEFAULT_ADDRESS = "127.0.0.1:50051"

SERVICE_CONFIG = {
    "methodConfig": [
        {
            # Every method of both may be sent again where it was refused with UNAVAILABLE: a generation that was
            # refused was not admitted, to attach again is what resuming is, to cancel twice is to cancel, and the
            # models are only read.
            "name": [{"service": "baton.v1.GenerationService"}, {"service": "baton.v1.ModelService"}],
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.2s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    # A client stops retrying once half of its recent calls failed: retries must not add to an outage.
    "retryThrottling": {"maxTokens": 20, "tokenRatio": 0.5},
}

CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    ("grpc.enable_retries", 1),
    # A long prompt's prefill is silence: without pings a dead peer would be noticed only by the deadline. Not more
    # often than servers permit (GOAWAY too_many_pings), and none where no call is open.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_send_message_length", -1),  # the server says what is too long, and how long it may be
    # While a channel backs off from connecting, every call fails at once: gRPC's own 1 s to 2 min would use up all
    # tries to attach again to a router that restarts. And an address that swallows packets is given up for the next.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # the time a connection may take
)


def channel_options(address: str) -> list[tuple[str, Any]]:
    options = list(CHANNEL_OPTIONS)
    if is_loopback_address(address):
        options.append(("grpc.enable_http_proxy", 0))  # a proxy from the environment cannot reach our loopback
    return options


def is_loopback(host: str) -> bool:
    """Whether ``host`` reaches no other machine. Names other than localhost are not looked up."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_loopback_address(address: str) -> bool:
    """The same of host:port, or of a socket in the file system."""
    return address.startswith("unix:") or is_loopback(address.rpartition(":")[0])


def addresses_of(address: str | Sequence[str]) -> tuple[str, ...]:
    """One or several, in the order in which they are tried. Raises ValueError for none."""
    addresses = (address,) if isinstance(address, str) else tuple(address)
    if not addresses or not all(addresses):
        raise ValueError("give at least one address, host:port, and none that is empty")
    return addresses


def call_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """What every call carries. Raises ValueError, which does not repeat the key, for one that no header can."""
    if api_key is None:
        return ()
    if not api_key or not api_key.isascii() or not api_key.isprintable() or api_key != api_key.strip():
        raise ValueError("api_key must be printable ASCII without blanks around it, or None")
    return (("authorization", f"Bearer {api_key}"),)
