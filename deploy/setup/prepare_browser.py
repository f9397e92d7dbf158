"""Prepares the browser that opens reports in tests: a headless Chromium, from a package of the npm registry.

    .venv/bin/python -m deploy.setup.prepare_browser

Owns ``$BATON_HOME/browser/chromium-VERSION`` (``BATON_HOME`` is ``~/.cache/baton`` by default): the program, some
libraries that a bare system lacks, one font family, and ``baton-manifest.json``. The package is made for machines
that have nothing of a desktop; it asks only for the C library. It is fetched as every package of npm here
(``npm_packages.py``): nothing of it is run or installed, and it is used only if its sha512 is the one below. The
folder appears in one rename.

Nothing but tests needs it: reports open in any browser.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from deploy.setup.console import StepFailed, main_guard, only_one, progress, run_logged, say
from deploy.setup.machine import check_disk, free_bytes_at
from deploy.setup.npm_packages import NpmPackage, fetch, find_npm
from deploy.setup.prepare_model import baton_home, sha256_of

PACKAGE = NpmPackage(
    "@sparticuz/chromium",
    "153.0.0",
    "sha512-jiGWqSvPMdu4+P9TilYqAR7yEGPEHINx+lCvE/NqNO/EHYzF/x1hUiI5T6ioVIt7dEy7n88byyT0vk+dnsgQwA==",
    download_mb=70,
)
LICENSE = "MIT; Chromium: BSD-3-Clause"
PROGRAM, LIBRARIES, FONTS, FONTS_CONF, MANIFEST = "chromium", "lib", "fonts", "fonts.conf", "baton-manifest.json"
FORMAT = 1
"""Raise it when this script makes other files from the same package: old folders are then made anew."""
NEEDED_BYTES = 10**9
"""The package 70 MB, unpacked 215 MB; an npm of its own 70 MB, unpacked 210 MB; and some room."""
UNPACK = """
const fs = require("fs"), zlib = require("zlib");
const [source, target] = process.argv.slice(1);
fs.writeFileSync(target, zlib.brotliDecompressSync(fs.readFileSync(source)));
"""


def folder_of(home: Path) -> Path:
    return home / "browser" / f"chromium-{PACKAGE.version}"


def environment_of(folder: Path) -> dict[str, str]:
    """What the program needs in its environment: its own libraries and fonts."""
    return {"LD_LIBRARY_PATH": str(folder / LIBRARIES), "FONTCONFIG_FILE": str(folder / FONTS_CONF)}


def fault_of(folder: Path) -> str | None:
    """Why this folder is not the prepared browser; None when every file is as its manifest says."""
    if not folder.exists():
        return "it is not there"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        recorded = dict(manifest["files"])
        is_current = manifest["format"] == FORMAT and manifest["integrity"] == PACKAGE.integrity
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read"
    if not is_current:
        return "it was made from another package or by another version of this script"
    missing = [name for name in (PROGRAM, FONTS_CONF, *recorded) if not (folder / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    changed = [name for name, digest in recorded.items() if sha256_of(folder / name) != digest]
    return f"{changed[0]} changed since it was made" if changed else None


def unpack(archive: Path, node: str, scratch: Path, target: Path) -> None:
    """Makes the folder. Raises ``StepFailed``."""
    with progress("unpacking the browser"):
        with tarfile.open(archive) as package:
            package.extractall(scratch, filter="data")
        packed = scratch / "package" / "bin"

        def inflate(name: str, into: Path) -> None:
            run_logged([node, "-e", UNPACK, str(packed / f"{name}.br"), str(into)], scratch / "unpack.log")

        try:
            inflate("chromium", target / PROGRAM)
            for name in ("al2023.tar", "fonts.tar"):
                inflate(name, scratch / name)
                with tarfile.open(scratch / name) as inner:
                    inner.extractall(scratch / name.removesuffix(".tar"), filter="data")
        except subprocess.CalledProcessError as error:
            raise StepFailed("node could not unpack the browser", "use node 12 or newer, or none") from error
        (target / PROGRAM).chmod(0o755)
        (scratch / "al2023" / "lib").rename(target / LIBRARIES)
        (scratch / "fonts" / "fonts").rename(target / FONTS)
        shutil.copy(scratch / "package" / "LICENSE", target / "LICENSE")
    # "relative" is to this file: the folder may be moved. The package's own file looks for fonts where a cloud
    # function has them, and without any font the browser stops at the first letter.
    (target / FONTS_CONF).write_text(
        '<?xml version="1.0"?>\n<!DOCTYPE fontconfig SYSTEM "fonts.dtd">\n<fontconfig>\n'
        f'  <dir prefix="relative">{FONTS}</dir>\n  <cachedir prefix="xdg">fontconfig</cachedir>\n</fontconfig>\n',
        encoding="utf-8",
    )
    files = {str(path.relative_to(target)): sha256_of(path) for path in sorted(target.rglob("*")) if path.is_file()}
    manifest = {
        "package": f"{PACKAGE.name}@{PACKAGE.version}",
        "integrity": PACKAGE.integrity,
        "license": LICENSE,
        "format": FORMAT,
        "files": files,
    }
    (target / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def prepare(home: Path) -> Path:
    """Makes sure the browser is there and whole; returns its folder. Raises ``StepFailed``."""
    folder = folder_of(home)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StepFailed(
            f"{folder.parent} cannot be made: {error.strerror}", "set BATON_HOME to a folder you own"
        ) from error
    with only_one(folder.parent / f".{folder.name}.lock", "preparing the browser"):
        fault = fault_of(folder)
        if fault is None:
            say(f"Browser: ready ({folder})")
            return folder
        say(f"Browser: preparing {folder} ({fault})")
        check_disk(folder.parent, free_bytes_at(folder.parent), NEEDED_BYTES, "preparing the browser")
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
            scratch = Path(name)
            fresh = scratch / "browser"
            fresh.mkdir()
            npm = find_npm(scratch)
            unpack(fetch(npm, PACKAGE, scratch), npm.node, scratch, fresh)
            fresh.chmod(0o755)
            if folder.exists():
                folder.rename(scratch / "old")
            fresh.rename(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        say(f"Browser: ready ({folder}, {size / 1e6:.0f} MB)")
        return folder


def main() -> None:
    try:
        prepare(baton_home())
    except OSError as error:
        raise StepFailed(
            f"preparing the browser: {error}", f"free {NEEDED_BYTES / 1e9:g} GB there or set BATON_HOME"
        ) from error


if __name__ == "__main__":
    main_guard(main)
