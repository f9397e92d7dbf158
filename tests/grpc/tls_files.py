"""Certificates for a test: made as it runs, and gone with it. A helper of the tests beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trustme


@dataclass(frozen=True)
class Identity:
    """A certificate and its key, as files."""

    certificate_path: Path
    key_path: Path

    @property
    def of_router(self) -> dict[str, Any]:
        """Its keys in a router's configuration."""
        return {"tls_certificate_path": str(self.certificate_path), "tls_key_path": str(self.key_path)}


class Authority:
    """A CA of its own. ``path``: its certificate."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._ca = trustme.CA()
        self.path = directory / "ca.pem"
        self._ca.cert_pem.write_to_path(self.path)

    def issue(self, *names: str, at: Path | None = None, **options: Any) -> Identity:
        """For ``names``, or for this machine. ``at``: where the files go, over those that are there."""
        made = self._ca.issue_cert(*(names or ("localhost", "127.0.0.1")), **options)
        folder = at or self._directory / "-".join(names or ("router",))
        folder.mkdir(parents=True, exist_ok=True)
        identity = Identity(folder / "certificate.pem", folder / "key.pem")
        identity.key_path.touch(mode=0o600)
        identity.key_path.write_bytes(made.private_key_pem.bytes())
        identity.certificate_path.write_bytes(b"".join(each.bytes() for each in made.cert_chain_pems))
        return identity
