"""The directory that one fleet keeps on the machine it was started from: secret, logs, and who runs.

Owns the layout and the modes of its files. Starts and stops nothing.

    .baton/            0700
      secret           0600, 64 hexadecimal digits, made at the first start
      ray_token        0600, for the Ray that the fleet starts itself
      fleet.json       the supervisor's process and the addresses, while the fleet runs
      logs/            one file per member, and supervisor.log
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from baton.secret import SECRET_BYTES, new_secret
from fleet.toml_table import ConfigError

SECRET_FILE = "secret"  # noqa: S105 - a file's name
RAY_TOKEN_FILE = "ray_token"  # noqa: S105 - a file's name


@dataclass(frozen=True, slots=True)
class FleetRecord:
    """What ``baton down`` and ``baton status`` know of a running fleet."""

    name: str
    runner: str
    config_path: str
    supervisor_pid: int
    supervisor_start: str
    """Start time of that process as the kernel tells it: a reused process number is not the supervisor."""
    address: str
    """Public address of the router."""
    admin_address: str
    ray_address: str = ""
    ray_namespace: str = ""
    is_ready: bool = False
    is_failed: bool = False
    members: list[dict[str, Any]] = field(default_factory=list)
    family: list[list[Any]] = field(default_factory=list)
    """Number and start time of the supervisor's descendants: what to look for should it die without warning."""
    said: list[str] = field(default_factory=list)
    """Progress lines so far, for whoever waits for the start."""


class StateDir:
    """Access to the directory. Creating it is the only effect of the constructor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.chmod(0o700)

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def record_file(self) -> Path:
        return self.path / "fleet.json"

    def secret(self, secret_file: str = "") -> bytes:
        """The cluster's secret; made if there is none. Raises ``ConfigError`` for a file without one."""
        if not secret_file:
            own = self.path / SECRET_FILE
            with contextlib.suppress(FileExistsError):
                _write_new(own, new_secret().hex())
        file = Path(secret_file).expanduser() if secret_file else self.path / SECRET_FILE
        try:
            secret = bytes.fromhex(file.read_text(encoding="ascii").strip())
        except FileNotFoundError:
            raise ConfigError(f"cluster.secret_file: there is no file {file}") from None
        except (OSError, ValueError):
            raise ConfigError(f"{file}: does not hold a secret of {2 * SECRET_BYTES} hexadecimal digits") from None
        if len(secret) != SECRET_BYTES:
            raise ConfigError(f"{file}: holds {len(secret)} bytes; a secret has {SECRET_BYTES}")
        if file.stat().st_mode & 0o077:
            raise ConfigError(f"{file}: others may read it; run: chmod 600 {file}")
        return secret

    def ray_token_file(self) -> Path:
        """The file with the token of the fleet's own Ray; made if there is none."""
        file = self.path / RAY_TOKEN_FILE
        with contextlib.suppress(FileExistsError):
            _write_new(file, secrets.token_hex(32))
        return file

    def read_record(self) -> FleetRecord | None:
        """The record of a fleet whose supervisor lives; None otherwise."""
        record = self.read_last_record()
        if record is None:
            return None
        if record.supervisor_pid and process_start(record.supervisor_pid) != record.supervisor_start:
            return None
        return record

    def read_last_record(self) -> FleetRecord | None:
        """The record, even if its supervisor died and left it."""
        try:
            return FleetRecord(**json.loads(self.record_file.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def write_record(self, record: FleetRecord) -> None:
        """Replaces the record in one step: a reader sees the old or the new one."""
        fresh = self.record_file.with_suffix(".new")
        fresh.write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")
        fresh.chmod(0o600)
        fresh.replace(self.record_file)

    def remove_record(self) -> None:
        self.record_file.unlink(missing_ok=True)

    def lock(self) -> int:
        """Held by the supervisor for life: two of them cannot share a directory. Raises ``BlockingIOError``."""
        fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(fd)
            raise
        return fd


def process_start(pid: int) -> str:
    """The start time of a process in kernel ticks since boot; "" if it is gone or only a zombie is left."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()  # the command's name may hold spaces and brackets
    return "" if fields[0] == "Z" else fields[19]


def _write_new(file: Path, text: str) -> None:
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="ascii") as out:
        out.write(text + "\n")
