"""Whom a key is sent to, which files make TLS, and what gRPC's words about a handshake mean."""

from __future__ import annotations

import argparse
import copy
import itertools
import pickle
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme

from baton.__main__ import main
from baton.cli.arguments import UsageError, add_connection_arguments, security_of
from baton.cli.exits import UNAVAILABLE, USAGE, error_line, exit_code
from baton.client import BatonClient
from baton.errors import HandshakeFailed, Unavailable
from baton.handshake import Security, tls_failure
from baton.sync_client import BatonClientSync
from baton.tls import Tls, TlsFilesError, read_cas
from router.config import ConfigError, RouterConfig
from router.tls_files import TlsFiles, refuse_readable_by_others

HERE, FAR = "127.0.0.1:50051", "10.0.0.7:50051"
KEY = "a-key-of-ours"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with certificate.pem, key.pem and ca.pem."""
    ca = trustme.CA()
    made = ca.issue_cert("localhost")
    (tmp_path / "key.pem").touch(mode=0o600)
    made.private_key_pem.write_to_path(tmp_path / "key.pem")
    made.cert_chain_pems[0].write_to_path(tmp_path / "certificate.pem")
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    return tmp_path


def tls_files(folder: Path, **changes: str) -> TlsFiles:
    paths = {"certificate_path": "certificate.pem", "key_path": "key.pem", "client_ca_path": "ca.pem"}
    return TlsFiles(**{name: str(folder / changes.get(name, file)) for name, file in paths.items()})


# Whom a key is sent to


@pytest.mark.parametrize("address", [HERE, "localhost:1", "[::1]:1", "127.1.2.3:1", "unix:/run/baton.sock"])
def test_a_key_may_go_in_clear_to_this_machine(address: str) -> None:
    BatonClientSync(address, api_key=KEY).close()


@pytest.mark.parametrize(
    "addresses",
    [
        [FAR],
        [HERE, FAR],
        ["baton.example.org:50051"],
        ["127.example.org:50051"],
        ["localhost.example.org:50051"],
        ["dns:///localhost:50051"],
        ["0.0.0.0:50051"],
        ["[fe80::1]:50051"],
    ],
)
def test_a_key_goes_in_clear_to_no_other_machine_unless_that_is_said(addresses: list[str]) -> None:
    with pytest.raises(ValueError, match="travel in clear") as caught:
        BatonClientSync(addresses, api_key=KEY)
    assert addresses[-1] in str(caught.value)
    assert KEY not in str(caught.value)
    BatonClientSync(addresses, api_key=KEY, allow_plaintext_api_key=True).close()
    BatonClientSync(addresses, api_key=KEY, tls=True).close()
    BatonClientSync(addresses).close()


async def test_the_asyncio_client_keeps_the_same_rule() -> None:
    with pytest.raises(ValueError, match="travel in clear"):
        BatonClient(FAR, api_key=KEY)


@pytest.mark.parametrize(
    ("change", "is_refused"),
    [
        ({}, True),
        ({"allow_plaintext_api_keys": True}, False),
        ({"tls_certificate_path": "c", "tls_key_path": "k"}, False),
        ({"api_keys_path": ""}, False),
        ({"listen_address": HERE}, False),
    ],
)
def test_a_router_asks_for_no_keys_in_clear_beyond_loopback_unless_that_is_said(
    change: dict[str, Any], is_refused: bool
) -> None:
    far = {"listen_address": FAR, "allow_non_loopback": True, "api_keys_path": "keys.toml"}
    values = {"model_name": "m", "model_dir": "d", **far, **change}
    if not is_refused:
        RouterConfig.from_mapping(values)
        return
    with pytest.raises(ConfigError) as caught:
        RouterConfig.from_mapping(values)
    assert all(
        key in str(caught.value) for key in ("tls_certificate_path", "tls_key_path", "allow_plaintext_api_keys")
    )


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"tls_certificate_path": "c"}, "tls_key_path is empty"),
        ({"tls_key_path": "k"}, "tls_certificate_path is empty"),
        ({"tls_client_ca_path": "a"}, "tls_client_ca_path needs TLS"),
    ],
)
def test_half_of_tls_is_none(keys: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RouterConfig.from_mapping({"model_name": "m", "model_dir": "d", **keys})


# Files


def junk(folder: Path, name: str) -> None:
    (folder / name).write_text("no PEM", encoding="utf-8")


def another_key(folder: Path) -> None:
    trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(folder / "key.pem")


def another_kind_of_key(folder: Path) -> None:
    made = trustme.CA().issue_cert("localhost", key_type=trustme.KeyType.RSA)
    made.private_key_pem.write_to_path(folder / "key.pem")


def passphrase(folder: Path) -> None:
    from cryptography.hazmat.primitives import serialization as to

    key = to.load_pem_private_key((folder / "key.pem").read_bytes(), None)
    kind = to.BestAvailableEncryption(b"secret")
    (folder / "key.pem").write_bytes(key.private_bytes(to.Encoding.PEM, to.PrivateFormat.PKCS8, kind))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "certificate.pem").unlink(), "tls_certificate_path: cannot read .*No such file"),
        (lambda folder: (folder / "key.pem").unlink(), "tls_key_path: cannot read .*No such file"),
        (lambda folder: (folder / "ca.pem").unlink(), "tls_client_ca_path: cannot read .*No such file"),
        (lambda folder: junk(folder, "certificate.pem"), "tls_certificate_path: there is no certificate in PEM"),
        (lambda folder: junk(folder, "key.pem"), "tls_key_path: there is no private key in PEM"),
        (lambda folder: junk(folder, "ca.pem"), "tls_client_ca_path: there is no certificate in PEM"),
        (another_key, "tls_key_path: the key .* is not that of the certificate"),
        (another_kind_of_key, "tls_key_path: the key .* is not that of the certificate"),
        (passphrase, "tls_key_path: the key .* has a passphrase"),
        (lambda folder: (folder / "key.pem").chmod(0o644), "tls_key_path: others may read .*chmod 600"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_key_and_the_fix(
    files: Path, spoil: Callable[[Path], object], words: str
) -> None:
    tls_files(files)
    spoil(files)
    with pytest.raises(TlsFilesError, match=words):
        tls_files(files)


@pytest.mark.parametrize(
    ("mode", "uid", "is_refused"),
    [
        (0o600, 1000, False),
        (0o400, 1000, False),
        (0o640, 1000, True),
        (0o640, 0, False),
        (0o660, 0, True),
        (0o644, 0, True),
    ],
)
def test_a_group_may_read_a_key_of_roots_alone(mode: int, uid: int, is_refused: bool) -> None:
    class Stat:
        st_mode, st_uid = 0o100000 | mode, uid

    class Key:
        def stat(self) -> Stat:
            return Stat()

    key: Any = Key()
    if is_refused:
        with pytest.raises(TlsFilesError, match="others may read"):
            refuse_readable_by_others(key)
    else:
        refuse_readable_by_others(key)


def test_what_did_not_change_is_not_read_again_and_what_did_is_once(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = tls_files(files)
    assert read.changed() is None
    for name in ("certificate.pem", "key.pem", "ca.pem"):
        (files / name).write_bytes((files / name).read_bytes() + b"\n")
        assert read.changed() is not None, name
        assert read.changed() is None, name
    loads: list[object] = []
    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", lambda *args, **_: loads.append(args))
    assert read.changed() is None
    assert loads == []


def written_meanwhile(monkeypatch: pytest.MonkeyPatch, read: Path, written: Path, text: bytes) -> None:
    """When OpenSSL has read ``read`` for the first time, ``written`` gets another text."""
    load, texts = ssl.SSLContext.load_verify_locations, [text]

    def loaded(self: ssl.SSLContext, cafile: Path) -> None:
        load(self, cafile=cafile)
        if cafile == read and texts:
            written.write_bytes(texts.pop())

    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", loaded)


def test_cas_that_are_written_while_they_are_read_are_refused(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cas = files / "ca.pem"
    two = cas.read_bytes() * 2
    written_meanwhile(monkeypatch, cas, cas, two)
    with pytest.raises(TlsFilesError, match=r"ca_path: .*ca.pem was written while it was read; try again"):
        read_cas(cas, "ca_path")
    assert read_cas(cas, "ca_path") == two


@pytest.mark.parametrize("half", [False, True])
def test_no_handshake_is_made_with_files_of_which_one_is_written_meanwhile(
    files: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, *, half: bool
) -> None:
    """The certificate is read before the CAs."""
    read, certificate, cas = tls_files(files), files / "certificate.pem", files / "ca.pem"
    whole = cas.read_bytes()
    cas.write_bytes(whole[:40] if half else whole * 2)
    other = (cas, whole) if half else (certificate, certificate.read_bytes() + b"\n")
    written_meanwhile(monkeypatch, certificate if half else cas, *other)
    assert read.changed() is None
    assert caplog.records == []
    assert read.changed() is not None, "they rest, and are used"
    assert read.changed() is None


def test_at_the_start_files_that_are_written_meanwhile_are_read_again(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, cas = files / "certificate.pem", files / "ca.pem"
    written_meanwhile(monkeypatch, cas, certificate, certificate.read_bytes() + b"\n")
    assert tls_files(files).changed() is None
    load, count = ssl.SSLContext.load_verify_locations, itertools.count(1)

    def loaded(self: ssl.SSLContext, cafile: Path) -> None:
        load(self, cafile=cafile)
        certificate.write_bytes(certificate.read_bytes() + b"\n" * next(count))

    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", loaded)
    with pytest.raises(TlsFilesError, match="are being written; start again"):
        tls_files(files)


def test_a_clients_files_are_refused_when_it_is_made(files: Path) -> None:
    ca, certificate, key = (files / name for name in ("ca.pem", "certificate.pem", "key.pem"))
    BatonClientSync(FAR, api_key=KEY, tls=Tls(ca, certificate, key)).close()
    another_key(files)
    for tls, words in (
        (Tls(files / "nowhere"), "ca_path: cannot read"),
        (Tls(key), "ca_path: there is no certificate"),
        (Tls(ca, certificate, key), "key_path: the key"),
    ):
        with pytest.raises(TlsFilesError, match=words):
            BatonClientSync(HERE, tls=tls)
    with pytest.raises(ValueError, match="belong together"):
        Tls(ca, certificate)


@pytest.mark.parametrize(
    ("environment", "tls"),
    [
        ({}, None),
        ({"BATON_TLS": "0"}, None),
        ({"BATON_TLS": ""}, None),
        ({"BATON_TLS": "1"}, Tls()),
        ({"BATON_TLS_CA": "ca"}, Tls("ca")),
        ({"BATON_TLS_CERTIFICATE": "c", "BATON_TLS_KEY": "k"}, Tls(None, "c", "k")),
        ({"BATON_TLS_CA": "ca", "BATON_TLS_SERVER_NAME": "n"}, Tls("ca", server_name="n")),
        ({"BATON_TLS_SERVER_NAME": "n"}, Tls(server_name="n")),
        ({"BATON_TLS": "0", "BATON_TLS_SERVER_NAME": "n"}, Tls(server_name="n")),
        ({"BATON_TLS": "0", "BATON_TLS_CA": ""}, None),
    ],
)
def test_the_environment_says_whether_and_how(environment: dict[str, str], tls: Tls | None) -> None:
    assert Tls.from_environment(environment) == tls


TLS_VARIABLES = ("BATON_TLS_CA", "BATON_TLS_CERTIFICATE", "BATON_TLS_KEY", "BATON_TLS_SERVER_NAME")


@pytest.mark.parametrize("name", TLS_VARIABLES)
@pytest.mark.parametrize("others", [{}, {"BATON_TLS": ""}, {"BATON_TLS": "1"}])
def test_a_variable_that_is_set_and_empty_is_refused_and_is_no_plaintext(name: str, others: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"{name} is set and empty.*unset"):
        Tls.from_environment({**others, name: ""})


def security(*command_line: str) -> Tls | None:
    parser = argparse.ArgumentParser()
    add_connection_arguments(parser)
    return security_of(parser.parse_args(command_line))["tls"]


@pytest.mark.parametrize("option", ["--tls-ca", "--tls-certificate", "--tls-key", "--tls-server-name"])
@pytest.mark.parametrize("others", [(), ("--tls",), ("--no-tls",)])
def test_an_option_that_is_empty_is_a_wrong_command_line(
    option: str, others: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (*TLS_VARIABLES, "BATON_TLS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match=f"{option} is empty"):
        security(option, "", *others)
    assert main(["models", "--address", FAR, option, "", *others]) == USAGE
    assert f"{option} is empty" in capsys.readouterr().err


def test_a_servers_name_asks_for_tls_and_what_the_command_line_says_stands_before_the_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (*TLS_VARIABLES, "BATON_TLS"):
        monkeypatch.delenv(name, raising=False)
    assert security() is None
    assert security("--tls-server-name", "n") == Tls(server_name="n")
    monkeypatch.setenv("BATON_TLS_CA", "")
    with pytest.raises(ValueError, match="BATON_TLS_CA is set and empty"):
        security()
    assert security("--tls-ca", "ca") == Tls("ca")
    assert security("--no-tls") is None


# What gRPC's words mean

TO = "failed to connect to all addresses; last error: "
OPENSSL = "Tls handshake failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1: SSL routines:OPENSSL_internal:"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (
            f"{TO}UNKNOWN: x: {OPENSSL}CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate",
            "not_trusted",
        ),
        (f"{TO}UNKNOWN: x: {OPENSSL}CERTIFICATE_VERIFY_FAILED: certificate has expired: OK", "expired"),
        (f"{TO}UNKNOWN: x: {OPENSSL}CERTIFICATE_VERIFY_FAILED: certificate is not yet valid", "not_yet_valid"),
        (f"{TO}UNKNOWN: x: UNAUTHENTICATED: Hostname Verification Check failed.", "wrong_name"),
        (f"{TO}UNKNOWN: x: {OPENSSL}WRONG_VERSION_NUMBER: Invalid", "plaintext_server"),
    ],
)
def test_what_proves_a_failed_handshake_is_one_error_with_advice_and_cause(text: str, kind: str) -> None:
    error = tls_failure(text, FAR, None)
    assert isinstance(error, HandshakeFailed)
    assert (error.metadata["tls"], error.is_retryable, exit_code(error)) == (kind, False, UNAVAILABLE)
    assert text.removeprefix(TO)[-40:] in error.message
    assert error.message in error_line(error, FAR)
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (type(again), again.metadata, str(again)) == (HandshakeFailed, error.metadata, str(error))


@pytest.mark.parametrize("words", ["CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER", "certificate has expired"])
def test_a_gateways_words_about_another_connection_prove_nothing_of_this_one(words: str) -> None:
    gateway = f"upstream connect error; transport failure reason: TLS_error:|1:SSL routines:{words}:TLS_error_end"
    assert [tls_failure(gateway, FAR, security) for security in (None, *Security)] == [None] * 4
    relayed = tls_failure(f"{TO}UNKNOWN: x: {OPENSSL}{words}", FAR, Security.PLAINTEXT)
    assert not isinstance(relayed, HandshakeFailed), "who speaks no TLS makes no handshake"


@pytest.mark.parametrize("cause", ["Socket closed", "recvmsg:Connection reset by peer"])
def test_what_may_have_another_cause_is_a_lost_connection_with_a_hint(cause: str) -> None:
    hints = set()
    for security in Security:
        error = tls_failure(f"{TO}UNAVAILABLE: x: {cause}", FAR, security)
        assert error is not None
        assert (type(error), error.metadata["tls"], error.is_retryable) == (Unavailable, "unsure", True)
        assert cause in error.message
        hints.add(error.message)
    assert len(hints) == len(Security)
    assert tls_failure(f"{TO}UNAVAILABLE: x: {cause}", FAR, None) is None, "nobody knows what is spoken"


def test_that_grpc_tells_of_one_of_a_names_addresses_alone_is_said_to_who_speaks_tls() -> None:
    text = f"{TO}UNKNOWN: ipv6:%5B::1%5D:1: Failed to connect to remote host: Connection refused"
    for security in (Security.TLS, Security.MUTUAL_TLS):
        error = tls_failure(text, "localhost:1", security)
        assert error is not None
        assert (type(error), error.metadata["tls"]) == (Unavailable, "unsure")
        assert all(words in error.message for words in ("localhost:1", "IP address", "Connection refused"))
    assert tls_failure(text, "localhost:1", Security.PLAINTEXT) is None, "most often there is no server"
    assert tls_failure(text, "[::1]:1", Security.TLS) is None


@pytest.mark.parametrize("text", ["Socket closed", f"{TO}UNKNOWN: x: Connection refused", "", "GOAWAY received"])
def test_what_tls_has_nothing_to_do_with_is_left_alone(text: str) -> None:
    for security in (*Security, None):
        assert tls_failure(text, FAR, security) is None
