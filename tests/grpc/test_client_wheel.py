"""The client's wheel as other teams get it: in a fresh environment that has grpcio, protobuf and pytest and nothing
of ours besides. Nothing is downloaded: those three are the ones of this environment."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from deploy.setup import wheels

RUNTIME = ("grpcio", "protobuf", "typing_extensions")
PYTEST = ("pytest", "iniconfig", "packaging", "pluggy", "pygments")

PROGRAM = """
import asyncio
from baton.client import BatonClient
from baton.errors import Overloaded
from baton.sync_client import BatonClientSync
from baton.testing import FakeBaton


async def main() -> None:
    async with FakeBaton() as fake, BatonClient(fake.address) as client:
        fake.will_answer("Once upon a time")
        fake.will_cut(after_tokens=7)
        answer = await client.complete_chat([("user", "A story, please")], timeout=60, resume=True)
        print(answer.text, "/", answer.resume_count)
        fake.will_refuse()
        try:
            await client.complete("again", timeout=60)
        except Overloaded as error:
            print(error.reason.value, error.is_retryable)


asyncio.run(main())
with FakeBaton() as fake, BatonClientSync(fake.address) as client:
    print(client.complete("hello", timeout=60).text)
"""
TEST = """
from baton.sync_client import BatonClientSync


def test_the_answer_is_read(fake_baton):
    fake_baton.will_answer("forty", "-two")
    with BatonClientSync(fake_baton.address) as client:
        assert client.complete("6 * 7", timeout=60).text == "forty-two"
    assert fake_baton.requests[0].prompt.text == "6 * 7"
"""
BARE_TEST = """
import sys


def test_nothing_was_loaded_that_nobody_asked_for():
    assert "baton.pytest_plugin" in sys.modules
    assert not {"baton.testing", "baton.errors", "grpc", "google.protobuf"} & set(sys.modules)
"""
PYTEST_QUIETLY = ("-m", "pytest", "-q", "-p", "no:cacheprovider")


def environment(folder: Path, wheel: Path, *distributions: str) -> Path:
    """A fresh one with the wheel and those of this environment's distributions. Returns its interpreter."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    for name in distributions:
        distribution = importlib.metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or () if ".." not in file.parts}
        for top in tops - {"__pycache__"}:
            if not (site / top).exists():  # google/ is of several
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    return python


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = wheels.build(tmp_path_factory.mktemp("wheels"))
    return next(path for path in made if path.name.startswith("baton_client"))


def run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_program_and_a_test_with_the_fixture_run_on_grpcio_and_protobuf_alone(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", wheel, *RUNTIME, *PYTEST)
    check = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "check"]
    assert "No broken requirements" in run(check, tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    assert run([str(python), "program.py"], tmp_path).splitlines() == [
        "Once upon a time / 1",
        "QUEUE_FULL True",
        "You said: hello",
    ]
    (tmp_path / "test_theirs.py").write_text(TEST)
    assert "1 passed" in run(
        [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_theirs.py"], tmp_path
    )


def test_the_plugin_is_no_burden_where_it_is_not_used_and_grpc_is_absent(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", wheel, *PYTEST)
    (tmp_path / "test_theirs.py").write_text(BARE_TEST)
    assert "1 passed" in run(
        [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_theirs.py"], tmp_path
    )
