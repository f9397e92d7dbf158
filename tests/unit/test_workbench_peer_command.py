"""``baton bench peer``: what it lists, what it refuses, and that a started peer ends with the command."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from bench.commands import peer
from bench.comparison import environments
from bench.comparison.specs import SYSTEMS
from deploy.setup.console import StepFailed
from deploy.setup.environment import Environment


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    peer.add_command(parser.add_subparsers())
    return parser.parse_args(["peer", *arguments])


class FakeSystem:
    """Up until it is told to stop."""

    def __init__(self, spec: Any, kind: str) -> None:
        self.spec, self.target_kind = spec, kind
        self.target_address = "127.0.0.1:8000" if kind == "baton" else "http://127.0.0.1:8000"
        self.facts = {"start_s": 3.2}
        self.is_stopped = False

    def assert_running(self) -> None:
        """Asked now and then while it runs: a good moment for Ctrl-C."""
        assert not self.is_stopped
        os.kill(os.getpid(), signal.SIGINT)

    def stop(self) -> None:
        self.is_stopped = True


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BATON_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def signals() -> Any:
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_the_list_names_every_peer_and_what_is_not_installed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert peer.run(parsed("--list")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(SYSTEMS)
    missing = {line.split()[0]: line for line in lines if "not installed" in line}
    assert missing.keys() == {"naive", "vllm-2x1core", "vllm-2x1core-chunk-128", "stock-router", "stock-router-tuned"}
    assert missing["naive"].endswith("(not installed: peer-naive)")


def test_it_works_from_any_folder(home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-m", "baton", "bench", "peer", "--list"],
        cwd=home,
        capture_output=True,
        text=True,
        timeout=60.0,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("baton ")


def test_without_a_checkout_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peer, "ROOT", tmp_path)
    assert peer.run(parsed("--list")) == 1
    assert "from a checkout of Baton" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "word"), [(("nobody",), "there is no peer 'nobody'"), ((), "--list names them")]
)
def test_a_wrong_name_is_refused_with_the_right_ones(
    arguments: tuple[str, ...], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert peer.run(parsed(*arguments)) == 2
    assert word in capsys.readouterr().err


def test_installing_says_where_and_a_failure_says_what_to_do(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def prepared(name: str) -> Environment:
        asked.append(name)
        if name == "peer-router":
            raise StepFailed("the network is gone", "plug it in")
        return Environment(home / name)

    monkeypatch.setattr(environments, "prepared", prepared)
    assert peer.run(parsed("naive", "--install")) == 0
    assert capsys.readouterr().out == f"peer-naive: {home / 'peer-naive'}\n"
    assert peer.run(parsed("baton", "--install")) == 0
    assert "Baton's own environment" in capsys.readouterr().out
    assert peer.run(parsed("--install")) == 1
    assert "plug it in" in capsys.readouterr().err
    assert asked[0] == "peer-naive"
    assert asked[-1] == "peer-router", "it ends at the first that fails"


def test_installing_all_installs_what_systems_need_once_and_nothing_else(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def prepared(name: str) -> Environment:
        asked.append(name)
        return Environment(home / name)

    monkeypatch.setattr(environments, "prepared", prepared)
    assert peer.run(parsed("--install")) == 0
    assert sorted(asked) == ["peer-haproxy", "peer-naive", "peer-router"], "a load generator is no peer"


@pytest.mark.parametrize(("kind", "scheme"), [("openai", ""), ("baton", "baton://")])
def test_a_started_peer_says_how_to_load_it_and_ends_with_the_command(
    kind: str,
    scheme: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    signals: None,
) -> None:
    systems: list[FakeSystem] = []

    def start_system(spec: Any, *_: Any, port: int | None) -> FakeSystem:
        systems.append(FakeSystem(spec, kind))
        return systems[0]

    monkeypatch.setattr("bench.peers.start_system", start_system)
    monkeypatch.setattr("bench.commands.peer.WATCH_INTERVAL_S", 0.01)
    monkeypatch.setattr("fleet.config.check_model_directory", lambda config: None)
    config = Path(__file__).resolve().parents[2] / "deploy" / "baton.toml"
    assert peer.run(parsed("naive", "--config", str(config))) == 0
    assert systems[0].is_stopped
    said = capsys.readouterr().out
    assert f"baton bench run --target {scheme}{systems[0].target_address} --label naive" in said
    assert "ready after 3 s" in said


def test_an_end_while_starting_is_no_error(monkeypatch: pytest.MonkeyPatch, signals: None) -> None:
    def start_system(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(60.0)  # the signal's exception comes here
        raise AssertionError("it went on")

    monkeypatch.setattr("bench.peers.start_system", start_system)
    monkeypatch.setattr("fleet.config.check_model_directory", lambda config: None)
    config = Path(__file__).resolve().parents[2] / "deploy" / "baton.toml"
    assert peer.run(parsed("naive", "--config", str(config))) == 0
