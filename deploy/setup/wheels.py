"""Builds the two wheels: ``baton-serve`` (everything) and ``baton-client`` (only the package ``baton``).

    .venv/bin/python -m deploy.setup.wheels [--out FOLDER]

Both come from this tree and carry one version, ``baton.__version__``. Each is built in a scratch copy of what
belongs to it, offline, with the setuptools of the environment; the tree itself gets no build folder.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from deploy.setup.console import StepFailed, main_guard, progress, run_logged, say

ROOT = Path(__file__).resolve().parents[2]
CLIENT = ROOT / "deploy" / "client"
_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc")


def stage_serve(into: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns: list[str] = project["tool"]["setuptools"]["packages"]["find"]["include"]
    for name in (pattern.rstrip("*") for pattern in patterns):
        shutil.copytree(ROOT / name, into / name, ignore=_IGNORED)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, into / name)


def stage_client(into: Path) -> None:
    shutil.copytree(ROOT / "baton", into / "baton", ignore=_IGNORED)
    for path in (CLIENT / "pyproject.toml", CLIENT / "README.md", ROOT / "LICENSE"):
        shutil.copy2(path, into / path.name)


def build(out: Path) -> list[Path]:
    """Builds both into ``out`` and returns their paths. Raises ``StepFailed``."""
    out.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []
    for name, stage in (("baton-serve", stage_serve), ("baton-client", stage_client)):
        with tempfile.TemporaryDirectory(prefix="baton-wheel-") as folder, progress(f"building {name}"):
            tree, wheels = Path(folder) / "tree", Path(folder) / "wheels"
            tree.mkdir()
            stage(tree)
            command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels), str(tree)]
            try:
                run_logged(command, Path(folder) / "build.log")
            except subprocess.CalledProcessError as error:
                tail = "".join(error.output.splitlines(keepends=True)[-15:])
                raise StepFailed(f"{name} does not build:\n{tail}", "correct what the build names") from error
            (wheel,) = wheels.glob("*.whl")
            made.append(Path(shutil.copy2(wheel, out / wheel.name)))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the wheels of baton-serve and baton-client.")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    for wheel in build(parser.parse_args().out):
        say(f"  {wheel} ({wheel.stat().st_size / 1e3:.0f} kB)")


if __name__ == "__main__":
    main_guard(main)
