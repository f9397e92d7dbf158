"""buf as `make check` asks it: what is uncommented or taken back is found, and nothing else."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest

from deploy.setup import prepare_buf, proto_rules
from deploy.setup.api_reference import PROTO
from deploy.setup.console import StepFailed
from deploy.setup.prepare_model import baton_home


@pytest.fixture(scope="module")
def buf() -> Path:
    folder = prepare_buf.folder_of(baton_home())
    fault = prepare_buf.fault_of(folder, prepare_buf.package_for(platform.machine()))
    if fault is not None:
        pytest.fail(f"buf is not ready at {folder}: {fault}. Run `make buf`.", pytrace=False)
    return folder / prepare_buf.PROGRAM


@pytest.fixture
def proto(tmp_path: Path) -> Path:
    """A copy of the .proto files, to break."""
    return shutil.copytree(PROTO, tmp_path / "proto")


def changed(proto: Path, name: str, old: str, new: str) -> None:
    text = (proto / name).read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} is no longer in {name} once"
    (proto / name).write_text(text.replace(old, new), encoding="utf-8")


GENERATION = "baton/v1/generation.proto"


def test_the_api_breaks_no_rule(buf: Path) -> None:
    assert proto_rules.complaints(buf, PROTO) == []


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("  int32 priority = 8;", "  int32 priority = 21;", 'field "8" with name "priority"'),
        ("  int32 priority = 8;", "  string priority = 8;", '"8" with name "priority" on message "GenerateRequest"'),
        ("  int32 priority = 8;\n", "", 'Previously present field "8" with name "priority"'),
        ("FINISH_REASON_CONTEXT_FULL = 3;", "FINISH_REASON_FULL = 3;", "FINISH_REASON_CONTEXT_FULL"),
        ("  rpc Generate(GenerateRequest) returns (stream GenerateResponse);\n", "", 'RPC "Generate"'),
    ],
    ids=["renumbered", "retyped", "dropped", "renamed", "uncallable"],
)
def test_what_was_released_and_is_taken_back_is_found(buf: Path, proto: Path, old: str, new: str, word: str) -> None:
    changed(proto, GENERATION, old, new)
    found = proto_rules.complaints(buf, proto)
    assert any(word in line and line.startswith(GENERATION) for line in found), found


def test_a_dropped_field_is_fine_once_its_number_and_name_are_reserved(buf: Path, proto: Path) -> None:
    changed(proto, GENERATION, "  int32 priority = 8;", '  reserved 8;\n  reserved "priority";')
    assert proto_rules.complaints(buf, proto) == []


def test_uncommented_elements_are_found(buf: Path, proto: Path) -> None:
    elements = ["  bool ignore_eos = 4;", "  JsonObject json_object = 2;", "message JsonObject {}"]
    for element in elements:  # in one go: a run of buf is most of a second
        text = (proto / GENERATION).read_text(encoding="utf-8")
        before, after = text.split(element)
        kept = before.rstrip("\n").splitlines()
        while kept[-1].strip().startswith("//"):
            kept.pop()
        (proto / GENERATION).write_text("\n".join([*kept, element]) + after, encoding="utf-8")
    found = proto_rules.complaints(buf, proto)
    assert len(found) == len(elements)
    assert all("should have a non-empty comment for documentation" in each for each in found)


def test_the_workers_api_may_change_and_is_no_part_of_what_is_released(buf: Path, proto: Path) -> None:
    worker = "baton/worker/v1/worker.proto"
    text = (proto / worker).read_text(encoding="utf-8")
    (proto / worker).write_text(text.replace(" = 1;", " = 91;"), encoding="utf-8")
    assert not any("breaking" in line or "Previously" in line for line in proto_rules.complaints(buf, proto))
    assert "worker.proto" not in (PROTO / proto_rules.RELEASED).read_text(encoding="utf-8")


def test_a_release_takes_the_present_api_and_refuses_one_that_takes_something_back(buf: Path, proto: Path) -> None:
    changed(proto, GENERATION, "  int32 priority = 8;", "  int32 priority = 21;")
    with pytest.raises(StepFailed, match="priority"):
        proto_rules.release(buf, proto)
    changed(
        proto,
        GENERATION,
        "  int32 priority = 21;",
        "  int32 priority = 8;\n  // Extra, 0 to 9. Default 0.\n  int32 extra = 21;",
    )
    proto_rules.release(buf, proto)
    assert 'name: "extra"' in (proto / proto_rules.RELEASED).read_text(encoding="utf-8")
    changed(proto, GENERATION, "  int32 extra = 21;", "  int32 extra = 22;")
    assert any('"extra"' in line for line in proto_rules.complaints(buf, proto))


def test_a_file_that_is_no_proto_is_a_failure_and_no_complaint(buf: Path, proto: Path) -> None:
    (proto / proto_rules.RELEASED).write_text("file: {", encoding="utf-8")
    with pytest.raises(StepFailed, match="buf breaking failed"):
        proto_rules.complaints(buf, proto)
