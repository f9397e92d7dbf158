"""The peers' own environments: one folder per lock under ``BATON_HOME``, made on first use, never changed after.

The folder's name ends in the digest of its locks, so a changed lock is a new environment beside the old one.
Installed as Baton's own is: full pins, ``--no-deps --require-hashes``; torch from ``deploy/locks/cpu-torch.txt``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from deploy.setup.console import StepFailed, only_one, say
from deploy.setup.environment import BYTECODE, LOCKS, TORCH, Environment, Part, pins
from deploy.setup.machine import check_disk, free_bytes_at
from deploy.setup.prepare_model import baton_home

NEEDED_BYTES: Mapping[str, int] = {
    "peer-naive": 3 * 10**9,
    "peer-router": 3 * 10**8,
    "peer-haproxy": 10**8,
    "peer-aiperf": 2 * 10**9,
}
"""Free disk that making each wants, by the name of its lock."""


def parts_of(name: str) -> list[Part]:
    """What is installed for the lock ``name``, in order. Raises ``StepFailed`` where the locks are not."""
    lock = Part(name, (LOCKS / f"{name}.txt",))
    if name not in NEEDED_BYTES or not lock.inputs[0].exists():
        raise StepFailed(f"there is no lock {lock.inputs[0]}", "run from a checkout of Baton, where deploy/locks is")
    return [TORCH, lock, BYTECODE] if name == "peer-naive" else [lock]


def environment_path(name: str) -> Path:
    """Where the environment of the lock ``name`` belongs."""
    digest = hashlib.sha256("".join(part.digest() for part in parts_of(name)).encode()).hexdigest()
    return baton_home() / "peers" / f"{name}-{digest[:12]}"


def is_prepared(name: str) -> bool:
    """Whether the environment of the lock ``name`` is there and whole."""
    return not Environment(environment_path(name)).outdated(parts_of(name))


def prepared(name: str) -> Environment:
    """The environment of the lock ``name``, installed now where it is missing, with visible progress.

    Raises ``StepFailed``.
    """
    environment, parts = Environment(environment_path(name)), parts_of(name)
    with only_one(environment.path.with_suffix(".lock"), f"preparing the environment of {name}"):
        if environment.outdated(parts):
            say(f"Environment of {name}: {environment.path}")
            check_disk(environment.path, free_bytes_at(environment.path), NEEDED_BYTES[name], f"the peer {name}")
            environment.bring_up_to_date(parts)
            if wrong := environment.differences(pinned_versions(name)):
                raise StepFailed(
                    f"the environment of {name} is not what the lock says: {'; '.join(wrong[:5])}",
                    f"delete {environment.path} and run the same command again",
                )
    return environment


def pinned_versions(name: str) -> dict[str, str]:
    """Package to version, of the lock ``name``."""
    found: dict[str, str] = {}
    for part in parts_of(name):
        if part is not BYTECODE:
            found |= pins(part.inputs[0].read_text(encoding="utf-8"))
    return found
