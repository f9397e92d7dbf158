"""TLS: whom a client trusts and who it is, and the reading of PEM files, which the router does as well.

Files are checked with OpenSSL when they are read: of a bad one gRPC says only that a connection or a port failed.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from baton.channels import is_loopback_address
from baton.handshake import Security

TLS_VARIABLE = "BATON_TLS"
CA_VARIABLE = "BATON_TLS_CA"
CERTIFICATE_VARIABLE = "BATON_TLS_CERTIFICATE"
KEY_VARIABLE = "BATON_TLS_KEY"
SERVER_NAME_VARIABLE = "BATON_TLS_SERVER_NAME"
_NAMING = (CA_VARIABLE, CERTIFICATE_VARIABLE, KEY_VARIABLE, SERVER_NAME_VARIABLE)


class TlsFilesError(ValueError):
    """A file with certificates or a key cannot be used; the message names option, file and fix."""


@dataclass(frozen=True, slots=True)
class Tls:
    """How a client speaks TLS. The files are read when the client is made; for renewed ones make another."""

    ca_path: str | Path | None = None
    """PEM file with the CAs one of which has signed the server's certificate. None: the public ones that gRPC brings
    along, or those in the file that GRPC_DEFAULT_SSL_ROOTS_FILE_PATH names."""
    certificate_path: str | Path | None = None
    """PEM file with the client's own certificate and what links it to its CA, for servers that ask for one..."""
    key_path: str | Path | None = None
    """...and its private key, without a passphrase."""
    server_name: str = ""
    """The name that the server's certificate must have. Empty: the host of the address."""

    def __post_init__(self) -> None:
        if (self.certificate_path is None) != (self.key_path is None):
            raise ValueError("certificate_path and key_path belong together; give both, or neither")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Tls | None:
        """None: no variable asks for TLS. ``BATON_TLS=1`` does, and so does each that names a file or the server.

        Raises ``ValueError`` for one of those that is set and empty, as a script makes it whose own variable is not
        set: without TLS the prompt would go in clear. ``BATON_TLS=0`` says that it may."""
        named = {name: environment.get(name) for name in _NAMING}
        is_asked = environment.get(TLS_VARIABLE, "") not in ("", "0")
        if environment.get(TLS_VARIABLE) != "0":
            for name, value in named.items():
                if value == "":
                    raise ValueError(
                        f"{name} is set and empty; give it a value, or unset it, or set {TLS_VARIABLE}=0"
                    )
        ca, certificate, key, server_name = (value or None for value in named.values())
        if not is_asked and not any(named.values()):
            return None
        return cls(ca, certificate, key, server_name or "")

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises ``TlsFilesError``."""
        roots = key = chain = None
        if self.ca_path is not None:
            roots = read_cas(self.ca_path, "ca_path")
        if self.certificate_path is not None and self.key_path is not None:
            key, chain = read_pair(self.certificate_path, self.key_path, ("certificate_path", "key_path"))
        return grpc.ssl_channel_credentials(roots, key, chain)


@dataclass(frozen=True, slots=True)
class Transport:
    """How a client makes its channels."""

    credentials: grpc.ChannelCredentials | None
    """None: plaintext."""
    options: tuple[tuple[str, Any], ...]
    security: Security | None
    """None: the caller's own credentials, of which we know nothing."""


def transport_of(
    addresses: Sequence[str],
    *,
    tls: Tls | bool | None,
    credentials: grpc.ChannelCredentials | None,
    api_key: str | None,
    allow_plaintext_api_key: bool,
) -> Transport:
    """Raises ``ValueError`` for two ways of TLS at once, for files that cannot be used (``TlsFilesError``), and for a
    key that would travel where others can read it."""
    if tls and credentials is not None:
        raise ValueError("give tls or credentials, not both")
    if credentials is not None:
        return Transport(credentials, (), None)
    if not tls:
        far = [] if api_key is None else [each for each in addresses if not is_loopback_address(each)]
        if far and not allow_plaintext_api_key:
            raise ValueError(
                f"the API key would travel in clear to {far[0]}; use TLS (tls=, --tls-ca, --tls), or permit it where "
                "nobody can read along (allow_plaintext_api_key=True, --allow-plaintext-api-key)"
            )
        return Transport(None, (), Security.PLAINTEXT)
    tls = Tls() if tls is True else tls
    options = (("grpc.ssl_target_name_override", tls.server_name),) if tls.server_name else ()
    security = Security.TLS if tls.certificate_path is None else Security.MUTUAL_TLS
    return Transport(tls.credentials(), options, security)


def read_cas(path: str | Path, option: str) -> bytes:
    """PEM. Raises ``TlsFilesError``."""
    file = Path(path).expanduser()
    data = _read(file, option)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=file)
    except (OSError, ValueError):
        raise TlsFilesError(f"{option}: there is no certificate in PEM in {file}; give the CA's") from None
    if _read(file, option) != data:
        raise TlsFilesError(f"{option}: {file} was written while it was read; try again")
    return data


def read_pair(certificate_path: str | Path, key_path: str | Path, options: tuple[str, str]) -> tuple[bytes, bytes]:
    """(private key, certificate chain), PEM. ``options``: what their paths are called. Raises ``TlsFilesError``."""
    files = Path(certificate_path).expanduser(), Path(key_path).expanduser()
    chain = read_cas(files[0], options[0])
    key = _read(files[1], options[1])
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*files, password=_refuse_passphrase)
    except ssl.SSLError as error:
        if error.reason in _MISMATCHES:
            raise TlsFilesError(
                f"{options[1]}: the key in {files[1]} is not that of the certificate in {files[0]} ({options[0]}); "
                "give the two that were made together"
            ) from None
        raise TlsFilesError(f"{options[1]}: there is no private key in PEM in {files[1]}") from None
    except _Passphrase:
        raise TlsFilesError(
            f"{options[1]}: the key in {files[1]} has a passphrase; write it without: openssl pkey -in FILE -out NEW"
        ) from None
    except OSError as error:
        raise TlsFilesError(f"{options[1]}: cannot read {files[1]}: {error.strerror}") from None
    if (_read(files[0], options[0]), _read(files[1], options[1])) != (chain, key):
        raise TlsFilesError(f"{options[0]}: {files[0]} and its key were written while they were read; try again")
    return key, chain


_MISMATCHES = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")
"""What OpenSSL says of a key that is another one's, the latter two of one of another kind."""


class _Passphrase(Exception):
    """The key has one."""


def _refuse_passphrase() -> str:
    raise _Passphrase  # without this OpenSSL would ask the terminal for it


def _read(file: Path, option: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise TlsFilesError(f"{option}: cannot read {file}: {error.strerror}") from None
