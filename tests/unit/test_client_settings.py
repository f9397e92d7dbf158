"""What other languages' clients are told is what our own client does, and what a router permits."""

from __future__ import annotations

import json
from typing import Any

import grpc
import grpc.aio
import pytest

from baton.channels import CHANNEL_OPTIONS, SERVICE_CONFIG
from baton.client import BatonClient
from baton.sync_client import BatonClientSync
from deploy.setup.client_settings import FOLDER, settings
from router.config import RouterConfig


@pytest.mark.parametrize("name", sorted(settings()))
def test_the_files_are_what_the_constants_make_of_them(name: str) -> None:
    """If this fails: python -m deploy.setup.client_settings"""
    assert (FOLDER / name).read_text() == settings()[name]


def test_they_say_what_our_client_sets() -> None:
    ours = dict(CHANNEL_OPTIONS)
    assert json.loads((FOLDER / "service_config.json").read_text()) == json.loads(ours["grpc.service_config"])
    told = json.loads((FOLDER / "channel_options.json").read_text())
    assert told == {name: value for name, value in ours.items() if name != "grpc.service_config"}


def test_our_client_pings_at_most_half_as_often_as_a_router_permits() -> None:
    ours = dict(CHANNEL_OPTIONS)
    permitted_s = RouterConfig(model_name="m", model_dir="d").min_ping_interval_s
    assert ours["grpc.keepalive_time_ms"] >= 2 * 1000 * permitted_s
    assert ours["grpc.http2.max_pings_without_data"] == 0, "gRPC would stop pinging after two"


def test_only_what_was_refused_before_it_was_admitted_is_sent_again() -> None:
    (method,) = SERVICE_CONFIG["methodConfig"]
    policy = method["retryPolicy"]  # type: ignore[index]
    assert policy["retryableStatusCodes"] == ["UNAVAILABLE"]
    assert "hedgingPolicy" not in method, "it would compute the prompt twice"


@pytest.mark.parametrize("kind", ["asyncio", "blocking"])
def test_options_of_the_callers_own_come_first_since_grpc_takes_the_first(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[tuple[str, Any]]] = []

    def insecure_channel(address: str, options: Any) -> None:
        seen.append(list(options))
        raise InterruptedError  # nothing is connected: what was set is all that is asked

    module, make = (grpc.aio, BatonClient) if kind == "asyncio" else (grpc, BatonClientSync)
    monkeypatch.setattr(module, "insecure_channel", insecure_channel)
    with pytest.raises(InterruptedError):
        make("127.0.0.1:1", options=[("grpc.keepalive_time_ms", 1234)])
    (options,) = seen
    assert next(value for name, value in options if name == "grpc.keepalive_time_ms") == 1234
