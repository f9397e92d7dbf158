"""The committed stubs are what the committed .proto files and the pinned generator make."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from deploy.setup import stubs
from deploy.setup.console import StepFailed
from deploy.setup.environment import LOCKS, pins


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stubs")
    stubs.generate(out)
    return out


def test_the_generator_is_the_locked_one() -> None:
    assert version("grpcio-tools") == pins((LOCKS / "dev.txt").read_text(encoding="utf-8"))["grpcio-tools"]


def test_committed_stubs_equal_freshly_generated_ones(fresh: Path) -> None:
    made = {str(path.relative_to(fresh)): path.read_text(encoding="utf-8") for path in fresh.rglob("*_pb2*.py*")}
    committed = {
        str(path.relative_to(stubs.ROOT)): path.read_text(encoding="utf-8")
        for path in (stubs.ROOT / "baton").rglob("*_pb2*.py*")
        if "__pycache__" not in path.parts
    }
    assert made.keys() == committed.keys(), "run make proto"
    stale = [name for name, text in made.items() if committed[name] != text]
    assert stale == [], "run make proto"


def test_a_changed_proto_file_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: Path) -> None:
    changed = tmp_path / "proto" / "baton" / "v1"
    changed.mkdir(parents=True)
    name = "errors.proto"
    text = (stubs.PROTO / "baton" / "v1" / name).read_text(encoding="utf-8")
    (changed / name).write_text(text.replace("ERROR_REASON_DRAINING", "ERROR_REASON_LEAVING"), encoding="utf-8")
    monkeypatch.setattr(stubs, "PROTO", tmp_path / "proto")
    stubs.generate(tmp_path / "out")
    made = (tmp_path / "out" / "baton" / "v1" / "errors_pb2.py").read_text(encoding="utf-8")
    assert made != (fresh / "baton" / "v1" / "errors_pb2.py").read_text(encoding="utf-8")


def test_a_broken_proto_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "proto").mkdir()
    (tmp_path / "proto" / "broken.proto").write_text('syntax = "proto3"; message {', encoding="utf-8")
    monkeypatch.setattr(stubs, "PROTO", tmp_path / "proto")
    with pytest.raises(StepFailed, match=r"broken\.proto"):
        stubs.generate(tmp_path / "out")
