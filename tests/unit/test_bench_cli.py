"""``baton bench``: its verbs are known by name, one is loaded, and what is missing is said."""

from __future__ import annotations

import argparse
import builtins
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import baton.__main__ as command
from bench import cli
from bench.commands.traffic_options import UsageError, pacer_spelling


def loaded_by(*arguments: str) -> set[str]:
    """Which modules of the workbench a command line loads, in a process of its own."""
    program = (
        "import sys; from baton.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print('loaded', *(name for name in sys.modules if name.split('.')[0] in ('bench', 'aiohttp', 'numpy')))"
    )
    process = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    return set(process.stdout.splitlines()[-1].split()[1:])


def test_other_commands_load_nothing_of_the_workbench() -> None:
    assert loaded_by("--help") == {"bench", "bench.cli"}


def test_only_the_verb_that_was_asked_for_is_loaded() -> None:
    assert loaded_by("bench", "--help") == {"bench", "bench.cli"}
    loaded = loaded_by("bench", "run", "--help")
    assert "bench.commands.run" in loaded
    assert not {"bench.commands.golden", "aiohttp", "numpy"} & loaded


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_its_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["bench", verb, "--help"])
    assert stop.value.code == 0
    assert f"bench {verb}" in capsys.readouterr().out


def test_without_the_server_it_names_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_is_installed", lambda _: False)
    assert command.main(["bench", "run"]) == 2
    assert "`baton bench` needs baton-serve" in capsys.readouterr().err


def test_without_the_extra_it_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real_import = builtins.__import__

    def without_pyarrow(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "bench" and name.endswith("results.store"):
            raise ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow")
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    assert command.main(["bench", "run"]) == 2
    assert "baton bench run needs pyarrow: pip install 'baton-serve[bench]'" in capsys.readouterr().err


def test_what_the_extra_brings_is_what_pyproject_says() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    wanted = tomllib.loads(text)["project"]["optional-dependencies"]["bench"]
    assert [re.split(r"[<>=]", one)[0] for one in wanted] == list(cli.EXTRA)
    assert "numpy" in cli.EXTRA, "the workbench imports it itself"


def test_a_missing_module_of_our_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: argparse.Namespace) -> int:
        raise ModuleNotFoundError("No module named 'bench.nowhere'", name="bench.nowhere")

    monkeypatch.setattr("bench.commands.run.run", broken)
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        command.main(["bench", "run"])


@pytest.mark.parametrize(
    ("text", "rate_per_s", "spelling"),
    [
        (None, None, "poisson:1"),
        ("ramp:1..8", None, "ramp:1..8"),
        (None, 2.0, "poisson:2"),
        ("constant", 0.5, "constant:0.5"),
        ("gamma:cv=3", 2.0, "gamma:2,cv=3"),
        ("gamma:9,cv=3", 2.0, "gamma:2,cv=3"),
        ("weibull:9,shape=0.7", 2.0, "weibull:2,shape=0.7"),
    ],
)
def test_a_rate_takes_the_place_of_the_pacers(text: str | None, rate_per_s: float | None, spelling: str) -> None:
    assert pacer_spelling(text, rate_per_s) == spelling


@pytest.mark.parametrize("text", ["ramp:1..8", "steps:1x30", "users:2x30,every=5", "nonsense"])
def test_a_pacer_of_many_rates_takes_none(text: str) -> None:
    with pytest.raises(UsageError, match="no one rate"):
        pacer_spelling(text, 2.0)
