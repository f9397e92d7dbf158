"""Makes the virtual environment that the locks describe, and does nothing when it is there already.

    python3.11 -m deploy.setup.environment [--dev]

Owns the folder of the environment (``VENV``, by default ``.venv``) and the stamp file in it. Runs on a bare
interpreter. Everything is installed with ``--no-deps`` from full pins: what is not in the lock does not come
in, which is how the CUDA builds of torchvision and torchaudio are kept out (``deploy/locks/README.md``).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from deploy.setup.console import Progress, StepFailed, main_guard, only_one, progress, run_logged, say
from deploy.setup.machine import FRESH_DISK_BYTES, REFRESH_DISK_BYTES, check_disk, check_machine, free_bytes_at

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ROOT / "deploy" / "locks"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""PyTorch's own index of CPU builds, asked only when the configured package source has no such build."""

STAMP = "baton-setup.json"
_PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)")


@dataclass(frozen=True)
class Part:
    """One thing to install. It is up to date when the stamp holds the digest of its inputs."""

    name: str
    inputs: tuple[Path, ...]

    def digest(self) -> str:
        digest = hashlib.sha256()
        for path in self.inputs:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        return digest.hexdigest()


TORCH = Part("torch", (LOCKS / "cpu-torch.txt",))
RUNTIME = Part("runtime", (LOCKS / "cpu.txt",))
DEV = Part("dev", (LOCKS / "dev.txt",))
BATON = Part("baton", (ROOT / "pyproject.toml",))
BYTECODE = Part("bytecode", (LOCKS / "cpu-torch.txt", LOCKS / "cpu.txt"))
NEVER_IMPORTED = (
    r".*/(tests?|testing|benchmarks)/"
    r"|/transformers/models/(?!auto/|llama/)"
    r"|/ray/(rllib|data|serve|tune|train|llm)/"
    r"|/(pip|numba|anthropic)/"
)
"""After the folder of the packages: half of what is installed. Other models' code, parts of Ray nothing here uses."""


def pins(lock_text: str) -> dict[str, str]:
    """Normalised name to version, of every pinned line of a lock."""
    found: dict[str, str] = {}
    for line in lock_text.splitlines():
        match = _PIN.match(line.strip())
        if match:
            found[normalised(match[1])] = match[2]
    return found


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def explain(output: str, part: str) -> StepFailed:
    """Why an installation failed, from what pip printed."""
    missing = re.search(r"No matching distribution found for (\S+)", output)
    if "No space left on device" in output:
        return StepFailed(
            f"the disk ran full while installing the {part} packages",
            "free about 6 GB (pip's temporary files use TMPDIR) and run the same command again",
        )
    if "do not match the hashes" in output or "THESE PACKAGES DO NOT MATCH" in output:
        return StepFailed(
            f"a downloaded {part} package is not the file that the lock names: its sha256 differs",
            "try again (a cut download also looks like this); if it stays, the package source serves changed files",
        )
    if re.search(r"Retrying|ConnectionError|NewConnectionError|Read timed out|Temporary failure in name", output):
        return StepFailed(
            f"the package source did not answer while fetching the {part} packages",
            "check the network and pip's configuration (pip config list), then run the same command again",
        )
    if missing:
        return StepFailed(
            f"{missing[1].rstrip(';')} is not to be had from the package source that pip is configured with",
            "use a source that carries it (pip config list shows yours), or regenerate the lock: make lock",
        )
    if "ResolutionImpossible" in output:
        return StepFailed(
            f"the {part} requirements contradict each other: see pip's output",
            "loosen one of them in deploy/locks/*.in",
        )
    last = next((line for line in reversed(output.strip().splitlines()) if line.strip()), "no output")
    return StepFailed(f"pip could not install the {part} packages: {last.strip()}", "read the log named above")


class Environment:
    """The virtual environment at ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.python = path / "bin" / "python"
        self._stamp_path = path / STAMP
        self._log = path / "baton-setup.log"

    def bring_up_to_date(self, parts: Iterable[Part]) -> list[str]:
        """Installs the parts that are missing or changed; returns their names. Raises ``StepFailed``."""
        if not self._works():
            self._create()
        stamp = self._read_stamp()
        changed: list[str] = []
        for part in self.outdated(parts):
            # Taken out BEFORE the work, so that an interrupted installation is not mistaken for a whole one.
            stamp.pop(part.name, None)
            self._write_stamp(stamp)
            self._install(part)
            stamp[part.name] = part.digest()
            self._write_stamp(stamp)
            changed.append(part.name)
        return changed

    def outdated(self, parts: Iterable[Part]) -> list[Part]:
        """The parts that are missing or whose inputs changed since they were installed."""
        stamp = self._read_stamp()
        return [part for part in parts if stamp.get(part.name) != part.digest()]

    def differences(self, wanted: dict[str, str]) -> list[str]:
        """What is installed in another version than pinned, or not at all."""
        listing = subprocess.run(  # noqa: S603 - our own interpreter
            [str(self.python), "-I", "-c", _LIST_INSTALLED], check=True, capture_output=True, text=True
        ).stdout
        installed = {normalised(name): version for name, version in json.loads(listing)}
        return [
            f"{name}: {installed.get(name, 'not installed')}, locked {version}"
            for name, version in sorted(wanted.items())
            if installed.get(name) != version
        ]

    def _works(self) -> bool:
        if not self.python.exists():
            return False
        answer = subprocess.run(  # noqa: S603 - our own interpreter
            [str(self.python), "-I", "-c", "import sys; print(sys.version_info[:2])"],
            capture_output=True,
            text=True,
            check=False,
        )
        return answer.returncode == 0 and answer.stdout.strip() == str(sys.version_info[:2])

    def _create(self) -> None:
        if self.path.exists():
            if not (self.path / "pyvenv.cfg").exists() and any(self.path.iterdir()):
                raise StepFailed(
                    f"{self.path} exists and is not a virtual environment",
                    "move it away, or choose another place: make VENV=/elsewhere/venv ...",
                )
            say(f"  {self.path} is broken or of another Python: making it anew")
            shutil.rmtree(self.path)
        command = [sys.executable, "-m", "venv", str(self.path)]
        if not _has_ensurepip():
            command.insert(3, "--without-pip")  # Debian splits it off; the host's pip then installs into the venv
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
        except (subprocess.CalledProcessError, OSError) as error:
            detail = getattr(error, "stderr", None) or str(error)
            raise StepFailed(
                f"a virtual environment cannot be made at {self.path}: {detail.strip().splitlines()[-1]}",
                "check that the folder can be written and that Python's venv module is installed "
                "(Debian: apt install python3.11-venv)",
            ) from error

    def _pip(self) -> list[str]:
        if importlib.util.find_spec("pip") is not None and not (self.path / "bin" / "pip").exists():
            return [sys.executable, "-m", "pip", "--python", str(self.python)]
        return [str(self.python), "-m", "pip"]

    def _install(self, part: Part) -> None:
        self._log.touch()
        if part is BATON:
            self._run_pip(part, ["--no-build-isolation", "--editable", str(ROOT)], 1)
            return
        if part is BYTECODE:
            self._compile()
            return
        (lock,) = part.inputs
        count = len(pins(lock.read_text(encoding="utf-8")))
        # Bytecode has a step of its own, which takes every core and leaves out half of the sources.
        arguments = ["--no-compile", "--requirement", str(lock)]
        if part is not TORCH:
            self._run_pip(part, ["--require-hashes", *arguments], count)
            return
        try:
            self._run_pip(part, arguments, count)
        except StepFailed as first:
            say(f"  {first.what}; trying PyTorch's own index of CPU builds")
            try:
                self._run_pip(part, ["--index-url", TORCH_CPU_INDEX, *arguments], count)
            except StepFailed as second:
                raise StepFailed(
                    f"the CPU build of torch is not to be had: neither where pip looks ({first.what}) "
                    f"nor at {TORCH_CPU_INDEX} ({second.what})",
                    "let this machine reach that index, or put the wheel in a folder and set PIP_FIND_LINKS to it",
                ) from second

    def _compile(self) -> None:
        """Every process imports thousands of files. Where PYTHONDONTWRITEBYTECODE is set, as in many images of
        Python, each would compile them anew: an engine starts in twice the time."""
        (packages,) = (self.path / "lib").glob("python3.*/site-packages")
        jobs = str(len(os.sched_getaffinity(0)))
        command = [str(self.python), "-I", "-m", "compileall", "-q", "-j", jobs]
        command += ["-x", f"{re.escape(str(packages))}({NEVER_IMPORTED})", str(packages)]
        with progress("compiling what will be imported"):
            try:
                run_logged(command, self._log)
            except subprocess.CalledProcessError as error:
                # Some packages carry templates that are no Python. What lacks bytecode is slower, and works.
                if "*** Error compiling" not in error.output:
                    raise StepFailed(
                        f"compiling ended with status {error.returncode}", f"read {self._log}, and run the same again"
                    ) from error

    def _run_pip(self, part: Part, arguments: list[str], package_count: int) -> None:
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_INPUT": "1",
        }
        environment.pop("PYTHONPATH", None)
        command = [*self._pip(), "install", "--no-deps", "--progress-bar", "off", *arguments]
        noun = "package" if package_count == 1 else "packages"
        title = "installing baton itself" if part is BATON else f"installing {package_count} {part.name} {noun}"
        try:
            with progress(title) as step:
                follower = _PipFollower(step, package_count)
                run_logged(command, self._log, env=environment, on_line=follower.line)
        except subprocess.CalledProcessError as error:
            say(f"  pip's output: {self._log}")
            raise explain(error.output, part.name) from error

    def _read_stamp(self) -> dict[str, str]:
        try:
            stamp = json.loads(self._stamp_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {str(k): str(v) for k, v in stamp.items()} if isinstance(stamp, dict) else {}

    def _write_stamp(self, stamp: dict[str, str]) -> None:
        fresh = self._stamp_path.with_suffix(".new")
        fresh.write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
        fresh.replace(self._stamp_path)


_LIST_INSTALLED = """
import importlib.metadata as m, json
print(json.dumps([(d.metadata["Name"], d.version) for d in m.distributions() if d.metadata["Name"]]))
"""


class _PipFollower:
    """Turns pip's lines into "collecting 57 of 190: ray"."""

    def __init__(self, step: Progress, package_count: int) -> None:
        self._step = step
        self._count = package_count
        self._collected = 0

    def line(self, line: str) -> None:
        if line.startswith(("Collecting ", "Requirement already satisfied:", "Processing ")):
            self._collected += 1
            name = line.removeprefix("Requirement already satisfied:").split()
            what = name[0] if line.startswith("Requirement") else line.split()[1]
            self._step.update(f"collecting {self._collected} of {self._count}: {what}")
        elif line.startswith("Downloading "):
            size = line[line.rfind("(") :] if "(" in line else ""
            self._step.update(f"downloading {self._collected} of {self._count}: {line.split()[1]} {size}")
        elif line.startswith("Installing collected packages"):
            self._step.update(f"unpacking {self._count} into the environment")


def _has_ensurepip() -> bool:
    return importlib.util.find_spec("ensurepip") is not None


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the virtual environment described by deploy/locks.")
    parser.add_argument("--dev", action="store_true", help="also the tools for tests, checks and builds")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where (default: .venv)")
    options = parser.parse_args()

    check_machine()
    environment = Environment(options.venv.absolute())
    is_fresh = not environment.python.exists()
    parts = [TORCH, RUNTIME, *([DEV] if options.dev else []), BATON, BYTECODE]
    with only_one(
        environment.path.parent / f".{environment.path.name.lstrip('.')}.lock", "setting up the environment"
    ):
        if is_fresh:
            say(f"Environment: {environment.path} (about 3 GB; a minute or two)")
            check_disk(environment.path, free_bytes_at(environment.path), FRESH_DISK_BYTES, "a new environment")
        elif environment.outdated(parts):
            check_disk(environment.path, free_bytes_at(environment.path), REFRESH_DISK_BYTES, "an update")
        changed = environment.bring_up_to_date(parts)
        if changed:
            locked: dict[str, str] = {}
            for part in parts:
                if part not in (BATON, BYTECODE):
                    locked |= pins(part.inputs[0].read_text(encoding="utf-8"))
            wrong = environment.differences(locked)
            if wrong:
                raise StepFailed(
                    f"the environment is not what the lock says: {'; '.join(wrong[:5])}",
                    f"delete {environment.path} and run the same command again",
                )
    say(f"Environment: ready ({', '.join(changed)} installed)" if changed else "Environment: ready")


if __name__ == "__main__":
    main_guard(main)
