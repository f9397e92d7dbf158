"""The router as a process: clear errors at the start, signals, and the ready line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from router.tiny_model import write_tiny_model

SECRET = "ab" * 32


def config(directory: Path, **changes: Any) -> Path:
    values = {
        "model_name": "tiny",
        "model_dir": str(directory / "model"),
        "listen_address": "127.0.0.1:0",
        "admin_address": "127.0.0.1:0",
        "metrics_address": "127.0.0.1:0",
        "log_level": "WARNING",
        **changes,
    }
    path = directory / "router.json"
    path.write_text(json.dumps(values))
    return path


def start(path: Path, secret: str = SECRET) -> subprocess.Popen[str]:
    environment = {**os.environ, "BATON_CLUSTER_SECRET": secret}
    return subprocess.Popen(
        [sys.executable, "-m", "router", "--config", str(path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_tiny_model(tmp_path / "model")
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "secret", "words"),
    [
        ({"model_dir": "/nowhere/model"}, SECRET, ["model_dir", "/nowhere/model", "does not exist"]),
        ({"queue_limmit": 1}, SECRET, ["unknown key 'queue_limmit'"]),
        ({"listen_address": "0.0.0.0:1"}, SECRET, ["listen_address", "allow_non_loopback"]),
        ({}, "", ["BATON_CLUSTER_SECRET is not set"]),
        ({}, "zz", ["BATON_CLUSTER_SECRET is not hexadecimal"]),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(
    directory: Path, changes: dict[str, Any], secret: str, words: list[str]
) -> None:
    process = start(config(directory, **changes), secret)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert all(word in said for word in words)
    assert said.count("\n") == 1


@pytest.mark.parametrize("key", ["listen_address", "admin_address", "metrics_address"])
def test_a_port_in_use_names_the_port_and_its_key(directory: Path, key: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        process = start(config(directory, **{key: address}))
        _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"router: {key}: cannot listen on {address}" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_ready_router_says_where_it_listens_and_a_signal_stops_it(directory: Path, number: int) -> None:
    process = start(config(directory))
    try:
        assert process.stdout is not None
        endpoint = json.loads(process.stdout.readline())
        for key in ("address", "admin_address", "metrics_address"):
            host, _, port = endpoint[key].rpartition(":")
            socket.create_connection((host, int(port)), timeout=60).close()
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0
        assert said == ""
    finally:
        process.kill()
        process.wait()


def test_a_second_router_cannot_share_the_port_of_a_first(directory: Path) -> None:
    first = start(config(directory))
    try:
        assert first.stdout is not None
        address = json.loads(first.stdout.readline())["address"]
        second = start(config(directory, listen_address=address))
        _, said = second.communicate(timeout=60)
        assert second.returncode == 2
        assert f"listen_address: cannot listen on {address}" in said
    finally:
        first.kill()
        first.communicate()
