"""Generates the Python code of ``proto/`` into the packages it belongs to, and the reference of the public API.

    .venv/bin/python -m deploy.setup.stubs [--out FOLDER]

The path of a .proto file under ``proto/`` is the path of its Python module, so nothing generated is rewritten.
``tests/unit/test_generated_code.py`` compares what is committed with what this makes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from deploy.setup import api_reference
from deploy.setup.console import StepFailed, main_guard, say

ROOT, PROTO = api_reference.ROOT, api_reference.PROTO


def generate(out: Path) -> list[Path]:
    """Writes the stubs under ``out``; returns their paths relative to it. Raises ``StepFailed``."""
    out.mkdir(parents=True, exist_ok=True)
    sources = sorted(path.relative_to(PROTO) for path in PROTO.rglob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={PROTO}"]
    command += [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    done = subprocess.run(  # noqa: S603 - our own arguments, no shell
        [*command, *map(str, sources)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise StepFailed(f"protoc refused: {done.stderr.strip()[-2000:]}", "correct the .proto file it names")
    endings = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")
    return [source.with_name(source.stem + ending) for source in sources for ending in endings]


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate the Python code of proto/.")
    parser.add_argument("--out", type=Path, default=ROOT)
    out = parser.parse_args().out
    made = generate(out)
    reference = api_reference.write(out)
    say(f"{len(made)} files generated, and {reference}")


if __name__ == "__main__":
    main_guard(main)
