"""Holds the .proto files to their rules: form and comments (buf lint), and nothing taken back (buf breaking).

    .venv/bin/python -m deploy.setup.proto_rules            # what `make check` runs
    .venv/bin/python -m deploy.setup.proto_rules release    # at a release: what is released from now on

The rules are those of ``proto/buf.yaml``. What was released is ``proto/released/v1.txtpb``, a picture of the API
without comments: a file of the tree, since a clone may have neither history nor network. ``release`` renews it, and
refuses where the new picture takes something back from the old one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path

from deploy.setup.api_reference import PROTO
from deploy.setup.console import StepFailed, main_guard, say
from deploy.setup.prepare_buf import prepare
from deploy.setup.prepare_model import baton_home

RELEASED = Path("released") / "v1.txtpb"
"""Below the folder of the .proto files."""
INTERNAL = ("--exclude-path", "baton/worker")
"""May break between releases, so nothing is kept of it."""


def complaints(buf: Path, proto: Path) -> list[str]:
    """What breaks a rule, one line each: file, line, what. Empty: nothing does. Raises ``StepFailed`` where buf
    itself could not work."""
    return [
        *_complaints(buf, proto, "lint"),
        *_complaints(buf, proto, "breaking", "--against", str(proto / RELEASED)),
    ]


def _complaints(buf: Path, proto: Path, *arguments: str) -> list[str]:
    done = _run(buf, proto, *arguments)
    if done.returncode == 0:
        return []
    if done.returncode == 100:  # buf's word for "I found something"
        return done.stdout.splitlines()
    raise StepFailed(f"buf {arguments[0]} failed: {done.stderr.strip()[-2000:]}", "correct the file it names")


def _run(buf: Path, proto: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - our own arguments, no shell
        [str(buf), *arguments],
        cwd=proto,
        env={**os.environ, "BUF_CACHE_DIR": str(buf.parent / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )


def release(buf: Path, proto: Path) -> None:
    """Makes the present API the released one. Raises ``StepFailed`` if that would take something back."""
    found = complaints(buf, proto) if (proto / RELEASED).exists() else _complaints(buf, proto, "lint")
    if found:
        raise StepFailed("the API breaks its rules: " + "; ".join(found), "correct the .proto files, then release")
    (proto / RELEASED).parent.mkdir(exist_ok=True)
    done = _run(buf, proto, "build", "--exclude-source-info", *INTERNAL, "--output", str(RELEASED))
    if done.returncode != 0:
        raise StepFailed(f"buf build failed: {done.stderr.strip()[-2000:]}", "correct the file it names")


def main() -> None:
    parser = argparse.ArgumentParser(description="Check the .proto files, or release the API they describe.")
    parser.add_argument("what", nargs="?", choices=("check", "release"), default="check")
    what = parser.parse_args().what
    buf = prepare(baton_home())
    if what == "release":
        release(buf, PROTO)
        say(f"released: proto/{RELEASED}")
        return
    found = complaints(buf, PROTO)
    for line in found:
        say(f"proto/{line}")
    if found:
        raise StepFailed(
            f"the .proto files break {len(found)} rules (buf lint, buf breaking)",
            "correct them; what was released stays: add fields, and reserve the numbers and names of dropped ones",
        )
    say("API: form and comments as they must be, nothing released is taken back")


if __name__ == "__main__":
    main_guard(main)
