"""The files of the public port's TLS: read and checked at the start, and again when they change, while it serves."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import grpc

from baton.tls import TlsFilesError, read_cas, read_pair
from router.config import RouterConfig

logger = logging.getLogger("baton.router")

MAX_READ_COUNT = 10
"""So often they are read at the start while they are being written."""

_Stamps = tuple[tuple[int, int, int] | None, ...]


class TlsFiles:
    """gRPC asks before every handshake, in a thread of its own, whether there is something new (``changed``). What
    cannot be used is refused once, in the log, and connections go on with what there was."""

    def __init__(self, certificate_path: str, key_path: str, client_ca_path: str = "") -> None:
        """Raises ``TlsFilesError``."""
        self._certificate, self._key, self._client_ca = (
            Path(each).expanduser() for each in (certificate_path, key_path, client_ca_path)
        )
        self._asks_for_client = bool(client_ca_path)
        self._lock = threading.Lock()
        for _ in range(MAX_READ_COUNT):
            self._stamps = self._stamps_now()  # BEFORE they are read
            first = self._whole(self._stamps)
            if first is not None:
                self._first = first
                return
        raise TlsFilesError(
            f"tls_certificate_path: {self._certificate}, its key or the CAs are being written; start again after that"
        )

    @classmethod
    def of(cls, config: RouterConfig) -> TlsFiles | None:
        """None: the configuration names none. Raises ``TlsFilesError``."""
        if not config.tls_certificate_path:
            return None
        return cls(config.tls_certificate_path, config.tls_key_path, config.tls_client_ca_path)

    def credentials(self) -> grpc.ServerCredentials:
        return grpc.dynamic_ssl_server_credentials(
            self._first,
            self.changed,  # type: ignore[arg-type]  # None is no change, as gRPC documents
            require_client_authentication=self._asks_for_client,
        )

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """What the next handshake is to be made with, if it is not what the last one was made with."""
        with self._lock:
            stamps = self._stamps_now()
            if stamps == self._stamps:
                return None
            before, self._stamps = self._stamps, stamps
            try:
                fresh = self._whole(stamps)
            except TlsFilesError as error:
                logger.warning(
                    "the changed certificate is not used, connections go on with the one before: %s", error
                )
                return None
            if fresh is None:
                self._stamps = before  # the next handshake looks again
                return None
            logger.info("the changed certificate in %s is used from now on", self._certificate)
            return fresh

    def _whole(self, stamps: _Stamps) -> grpc.ServerCertificateConfiguration | None:
        """None: a writer came in between, and what was read, good or bad, may be of two renewals, or half of one.
        Raises ``TlsFilesError``."""
        try:
            read = self._read()
        except TlsFilesError:
            if self._stamps_now() == stamps:
                raise
            return None
        return read if self._stamps_now() == stamps else None

    def _read(self) -> grpc.ServerCertificateConfiguration:
        pair = read_pair(self._certificate, self._key, ("tls_certificate_path", "tls_key_path"))
        refuse_readable_by_others(self._key)
        cas = read_cas(self._client_ca, "tls_client_ca_path") if self._asks_for_client else None
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=cas)

    def _stamps_now(self) -> _Stamps:
        files = [self._certificate, self._key, *([self._client_ca] if self._asks_for_client else [])]
        return tuple(_stamp(file) for file in files)


def refuse_readable_by_others(key: Path) -> None:
    """A group may read a key of root's, as those of Debian's ssl-cert. Raises ``TlsFilesError``."""
    try:
        stat = key.stat()
    except OSError as error:
        raise TlsFilesError(f"tls_key_path: cannot read {key}: {error.strerror}") from None
    if stat.st_mode & (0o027 if stat.st_uid == 0 else 0o077):
        raise TlsFilesError(f"tls_key_path: others may read {key}; run: chmod 600 {key}")


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """None: it is not there, or not ours to see. The time of change counts modes and owners, too."""
    try:
        stat = os.stat(file)
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_ctime_ns
