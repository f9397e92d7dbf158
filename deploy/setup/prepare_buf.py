"""Prepares buf, which checks the .proto files: one program, from a package of the npm registry.

    .venv/bin/python -m deploy.setup.prepare_buf

Owns ``$BATON_HOME/buf/VERSION`` (``BATON_HOME`` is ``~/.cache/baton`` by default): the program and
``baton-manifest.json`` with its sha256. buf's own package, ``@bufbuild/buf``, is a launcher of the package for the
machine, which is fetched here alone, by its sha512 (``npm_packages.py``). Once it is there nothing asks the network.
"""

from __future__ import annotations

import json
import platform
import tarfile
import tempfile
from pathlib import Path

from deploy.setup.console import StepFailed, main_guard, only_one, progress, say
from deploy.setup.machine import check_disk, free_bytes_at
from deploy.setup.npm_packages import NpmPackage, fetch, find_npm
from deploy.setup.prepare_model import baton_home, sha256_of

VERSION = "1.75.0"
PACKAGES = {
    "x86_64": NpmPackage(
        "@bufbuild/buf-linux-x64",
        VERSION,
        "sha512-YGGJAx0lpMCE7aMWjNOJcfoEaG/e+iYHnTC4SZ0P5eS4IffMryA9Z4/bb1m1wNXAEJ8ATFMEZOAk/5x9VE47ig==",
        download_mb=33,
    ),
    "aarch64": NpmPackage(
        "@bufbuild/buf-linux-aarch64",
        VERSION,
        "sha512-eX+XyokzJDqsNIFo8b1O3DBvbnksOozPJX4QVsNn61JqSUtWspyTNeYqwg8lRDancML+bDqZEDFPABjAsVCQGQ==",
        download_mb=33,
    ),
}
LICENSE = "Apache-2.0"
PROGRAM, MANIFEST = "buf", "baton-manifest.json"
NEEDED_BYTES = 500 * 10**6
"""The package 33 MB, the program 85 MB; an npm of its own 70 MB, unpacked 210 MB; and some room."""


def folder_of(home: Path) -> Path:
    return home / "buf" / VERSION


def package_for(processor: str) -> NpmPackage:
    """Raises ``StepFailed`` for a processor that we know no package for."""
    try:
        return PACKAGES[processor]
    except KeyError:
        raise StepFailed(
            f"there is no buf here for {processor}", f"check the API on a machine of {' or '.join(PACKAGES)}"
        ) from None


def fault_of(folder: Path, package: NpmPackage) -> str | None:
    """Why this folder is not the prepared buf; None when the program is as its manifest says."""
    if not folder.exists():
        return "it is not there"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        is_current, recorded = manifest["integrity"] == package.integrity, manifest["sha256"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read"
    if not is_current:
        return "it was made from another package"
    if not (folder / PROGRAM).is_file():
        return f"{PROGRAM} is missing"
    return None if sha256_of(folder / PROGRAM) == recorded else f"{PROGRAM} changed since it was made"


def unpack(archive: Path, package: NpmPackage, target: Path) -> None:
    """Writes the program and its manifest into ``target``. Raises ``StepFailed``."""
    with tarfile.open(archive) as packed:
        try:
            source = packed.extractfile(f"package/bin/{PROGRAM}")
        except KeyError:
            source = None
        if source is None:
            raise StepFailed(f"{archive.name} has no bin/{PROGRAM}", "correct PROGRAM in deploy/setup/prepare_buf.py")
        (target / PROGRAM).write_bytes(source.read())
    (target / PROGRAM).chmod(0o755)
    manifest = {
        "package": f"{package.name}@{package.version}",
        "integrity": package.integrity,
        "license": LICENSE,
        "sha256": sha256_of(target / PROGRAM),
    }
    (target / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def prepare(home: Path) -> Path:
    """Makes sure that buf is there and whole; returns the program. Raises ``StepFailed``."""
    package, folder = package_for(platform.machine()), folder_of(home)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StepFailed(
            f"{folder.parent} cannot be made: {error.strerror}", "set BATON_HOME to a folder you own"
        ) from error
    with only_one(folder.parent / f".{folder.name}.lock", "preparing buf"):
        fault = fault_of(folder, package)
        if fault is None:
            return folder / PROGRAM
        say(f"buf: preparing {folder} ({fault})")
        check_disk(folder.parent, free_bytes_at(folder.parent), NEEDED_BYTES, "preparing buf")
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
            scratch = Path(name)
            fresh = scratch / "fresh"
            fresh.mkdir(mode=0o755)
            archive = fetch(find_npm(scratch), package, scratch)
            with progress("unpacking buf"):
                unpack(archive, package, fresh)
            if folder.exists():
                folder.rename(scratch / "old")
            fresh.rename(folder)
        return folder / PROGRAM


def main() -> None:
    try:
        say(f"buf: ready ({prepare(baton_home())})")
    except OSError as error:
        raise StepFailed(
            f"preparing buf: {error}", f"free {NEEDED_BYTES / 1e9:g} GB there or set BATON_HOME"
        ) from error


if __name__ == "__main__":
    main_guard(main)
