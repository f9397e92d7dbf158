"""What a router process is told: one frozen dataclass, checked when it is made.

Read from a JSON or TOML file that the fleet writes. Unknown keys are refused by name. The cluster's secret is not in
it: secrets come by environment (``BATON_CLUSTER_SECRET``).
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from baton.channels import is_loopback
from router.chats.chat_abilities import MAX_ARGUMENT_NAMES, argument_name_problem
from router.goodbyes import longest_goodbyes_s


class ConfigError(ValueError):
    """A key has a wrong name, type or value; the message names the key and the fix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Keys of the router. Every address is ``host:port``; port 0 takes any free port."""

    model_name: str
    """The name callers ask for."""
    model_dir: str
    """Directory with tokenizer.json, config.json and, for chat, a chat template. No weights needed."""

    listen_address: str = "127.0.0.1:50051"
    """Public gRPC: generation, health, reflection."""
    admin_address: str = "127.0.0.1:50052"
    """ClusterService, for the fleet and for whoever steers it."""
    metrics_address: str = "127.0.0.1:9400"
    """Prometheus ``/metrics`` over HTTP."""
    allow_non_loopback: bool = False
    """Must be true for any address beyond loopback: only the public one can have TLS."""
    tls_certificate_path: str = ""
    """PEM file with the certificate of listen_address and what links it to its CA. Empty: plaintext. Read again when
    it changes, without a restart."""
    tls_key_path: str = ""
    """PEM file with its private key, without a passphrase; nobody else may read it."""
    tls_client_ca_path: str = ""
    """PEM file with the CAs of the clients' certificates: whoever has none is turned away. Empty: none is asked
    for."""
    allow_plaintext_api_keys: bool = False
    """Must be true to ask for API keys beyond loopback without TLS: something trusted in front of it has it."""

    max_context_token_count: int | None = None
    """Context of the engines; absent: the model's own (max_position_embeddings)."""
    max_message_bytes: int = 8 * 1024 * 1024
    """Largest request message; gRPC refuses larger ones while they arrive, with RESOURCE_EXHAUSTED."""
    max_unread_bytes: int = 16 * 1024 * 1024
    """Kept for one call whose caller does not read; an answer that grows past it ends with READER_TOO_SLOW."""
    max_concurrent_call_count: int = 4096
    """Generations that run at once; further ones get QUEUE_FULL. So many calls of ModelService, of WatchStatus and of
    the health's Watch may run besides. Beyond seven times as many open ones, with those whose caller does not read
    their end, gRPC itself refuses."""
    max_connection_call_count: int = 1024
    """Calls open at once on one connection; a client keeps further ones back until one of its own ends."""
    max_connection_age_s: float = 0.0
    """After this (give or take 10 %) a client is asked to connect anew, so that its next calls may go elsewhere; 0:
    never. What runs, runs on."""
    max_connection_age_grace_s: float = 3660.0
    """How long what runs on a connection of that age may take; then it is cut. With an age, above max_deadline_s."""
    min_ping_interval_s: float = 30.0
    """Clients may ping through silence, such as a long prefill, this often; who pings faster is cut off by gRPC."""
    default_deadline_s: float = 300.0
    """For calls that bring no deadline."""
    max_deadline_s: float = 3600.0
    """Longer deadlines are cut to this."""
    queue_limit: int = 256
    """Requests that may wait for admission; beyond it QUEUE_FULL."""
    max_in_flight_count: int = 512
    """Requests placed at once; beyond it they wait in the queue."""
    max_queue_wait_s: float = 60.0
    """Longest wait for admission, whatever the deadline; then QUEUE_FULL."""
    max_no_worker_wait_s: float = 10.0
    """Longest wait while no worker is ready at all; then NO_WORKER. The fleet restarts workers meanwhile."""
    max_attempt_count: int = 3
    """Attempts of one request, the first included, before it is given up."""
    prefill_timeout_s: float = 120.0
    """Longest wait for a prompt to be computed, the engine's queue included; then it is tried elsewhere."""
    gap_timeout_s: float = 60.0
    """Longest silence of a decode: until its KV is in place, a pull in vain included, and between two tokens. Then it
    is moved while attempts are left, and ends with STALLED otherwise."""
    lease_s: float = 30.0
    """How long a prefill worker holds KV that nobody fetches."""
    placement: str = "auto"
    """"auto": split, or local for short prompts; "split" or "local": always so where workers permit."""
    local_prompt_token_count: int = 0
    """With "auto": prompts with at most this many uncached tokens prefill on the decode worker. 0: never."""
    load_interval_s: float = 0.2
    """Between load reports of a worker."""
    worker_silence_s: float = 1.0
    """A worker silent for longer gets no new requests."""
    drain_notice_s: float = 0.5
    """After SIGTERM, how long calls are still taken while health says NOT_SERVING already, so that whoever watches it
    turns away before anybody is refused. Part of drain_grace_s; nobody waits where nothing runs."""
    drain_grace_s: float = 30.0
    """After SIGTERM, how long running requests may take to finish."""
    chat_template_path: str = ""
    """A chat template (Jinja) to use instead of the model's own. Empty: the model's own."""
    template_arguments: tuple[str, ...] = ()
    """Names of values that requests may give to the template, such as enable_thinking."""
    tool_parser: str = ""
    """Which of vLLM's parsers reads tool calls, such as hermes. Empty: requests may bring no tools."""
    reasoning_parser: str = ""
    """Which of vLLM's parsers takes the thinking out of the text, such as qwen3. Empty: it stays in the text."""
    parser_deadline_s: float = 10.0
    """How long the process that parses answers may take for one step of one answer."""
    parser_start_deadline_s: float = 120.0
    """How long it may take to start: it imports vLLM."""
    api_keys_path: str = ""
    """A .toml or .json file with a table for each API key: its name, the SHA-256 of the key, and its tenant. Public
    calls then need `authorization: Bearer KEY`. Empty: none is asked for. Followed: a change counts for the
    calls that come some two seconds later."""
    resume_grace_s: float = 30.0
    """How long a resumable generation waits for a caller who was cut off, unless the request says."""
    max_resume_grace_s: float = 300.0
    """Longer graces are cut to this."""
    max_resumable_count: int = 1024
    """Resumable generations kept at once, ended ones in their grace included; beyond it TOO_MANY_RESUMABLE."""
    resume_window_bytes: int = 1024 * 1024
    """Of one generation's answer, as much of its end is kept to be read again; its newest 64 tokens in any case."""
    resume_window_token_count: int = 16_384
    """And no more tokens than this, at least 64."""
    resume_total_bytes: int = 256 * 1024 * 1024
    """Of all these windows together; beyond it each keeps less."""
    enable_reflection: bool = True
    """Serve gRPC reflection, so that grpcurl works without the protos."""
    log_level: str = "INFO"

    @property
    def stop_grace_s(self) -> float:
        """From SIGTERM to the end of the last call, at most: the drain, and the goodbyes after it."""
        return self.drain_grace_s + longest_goodbyes_s(self.max_concurrent_call_count)

    def __post_init__(self) -> None:
        for name in ("model_name", "model_dir"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; it is required")
        for name in ("listen_address", "admin_address", "metrics_address"):
            self._check_address(name)
        self._check_range("max_context_token_count", 2, 10_000_000)
        self._check_range("max_message_bytes", 1024, 1024**3)
        self._check_range("max_concurrent_call_count", 1, 1_000_000)
        self._check_range("max_connection_call_count", 1, 1_000_000)
        self._check_range("max_connection_age_s", 0, 30 * 86_400)
        self._check_range("max_connection_age_grace_s", 0.001, 31 * 86_400)
        self._check_range("min_ping_interval_s", 0.01, 3600)
        self._check_range("default_deadline_s", 0.001, 86_400)
        self._check_range("max_deadline_s", 0.001, 86_400)
        self._check_range("max_unread_bytes", 64 * 1024, 1024**3)
        self._check_range("queue_limit", 0, 1_000_000)
        self._check_range("max_in_flight_count", 1, 1_000_000)
        self._check_range("max_queue_wait_s", 0.01, 86_400)
        self._check_range("max_no_worker_wait_s", 0.01, 86_400)
        self._check_range("max_attempt_count", 1, 16)
        self._check_range("prefill_timeout_s", 0.1, 86_400)
        self._check_range("gap_timeout_s", 0.1, 86_400)
        self._check_range("lease_s", 1, 3600)
        self._check_range("local_prompt_token_count", 0, 10_000_000)
        self._check_range("load_interval_s", 0.01, 10)
        self._check_range("worker_silence_s", 0.05, 60)
        self._check_range("drain_notice_s", 0, 3600)
        self._check_range("drain_grace_s", 0, 3600)
        self._check_range("parser_deadline_s", 0.1, 600)
        self._check_range("parser_start_deadline_s", 1, 3600)
        self._check_template_arguments()
        self._check_range("resume_grace_s", 0.01, 86_400)
        self._check_range("max_resume_grace_s", 0.01, 86_400)
        self._check_range("max_resumable_count", 0, 1_000_000)
        self._check_range("resume_window_bytes", 1024, 1024**3)
        self._check_range("resume_window_token_count", 64, 10_000_000)  # what each window keeps in any case
        self._check_range("resume_total_bytes", 1024, 1024**4)
        if self.resume_grace_s > self.max_resume_grace_s:
            raise ConfigError(
                f"resume_grace_s ({self.resume_grace_s}) must not be above max_resume_grace_s "
                f"({self.max_resume_grace_s})"
            )
        if self.default_deadline_s > self.max_deadline_s:
            raise ConfigError(
                f"default_deadline_s ({self.default_deadline_s}) must not be above "
                f"max_deadline_s ({self.max_deadline_s})"
            )
        if self.max_connection_age_s and self.max_connection_age_grace_s <= self.max_deadline_s:
            raise ConfigError(
                f"max_connection_age_grace_s ({self.max_connection_age_grace_s}) must be above max_deadline_s "
                f"({self.max_deadline_s}), or streams are cut that still have time; or set max_connection_age_s to 0"
            )
        if self.worker_silence_s < 2 * self.load_interval_s:
            raise ConfigError(
                f"worker_silence_s ({self.worker_silence_s}) must be at least twice load_interval_s "
                f"({self.load_interval_s}), or every worker is suspect between two reports"
            )
        self._check_tls()
        if self.placement not in ("auto", "split", "local"):
            raise ConfigError(f'placement is "{self.placement}"; must be "auto", "split" or "local"')
        if self.log_level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            raise ConfigError(f'log_level is "{self.log_level}"; must be DEBUG, INFO, WARNING or ERROR')

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> RouterConfig:
        """Raises ``ConfigError`` naming the first unknown key, missing key or wrong type."""
        hints = get_type_hints(cls)
        for key, value in mapping.items():
            if key not in hints:
                raise ConfigError(f"unknown key {key!r}; known keys: {', '.join(sorted(hints))}")
            if not _is_of_type(value, hints[key]):
                raise ConfigError(f"{key} must be {_type_name(hints[key])}, not {type(value).__name__}")
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        missing = [name for name in required if name not in mapping]
        if missing:
            raise ConfigError(f"missing key {missing[0]!r}; it is required")
        return cls(**{key: _converted(value, hints[key]) for key, value in mapping.items()})

    @classmethod
    def load(cls, path: Path) -> RouterConfig:
        """From a .json or .toml file. Raises ``ConfigError``, naming the file."""
        try:
            text = path.read_text(encoding="utf-8")
            data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{path} is malformed: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{path} must hold one object of keys")
        try:
            return cls.from_mapping(data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def _check_range(self, name: str, least: float, most: float) -> None:
        value = getattr(self, name)
        if value is not None and not least <= value <= most:
            raise ConfigError(f"{name} is {value}; must be {least:,} to {most:,}")

    def _check_template_arguments(self) -> None:
        names = self.template_arguments
        if len(names) > MAX_ARGUMENT_NAMES or len(set(names)) < len(names):
            raise ConfigError(f"template_arguments must be at most {MAX_ARGUMENT_NAMES} different names")
        for name in names:
            if (problem := argument_name_problem(name)) is not None:
                raise ConfigError(f"template_arguments: {name!r} {problem}")

    def _check_address(self, name: str) -> None:
        host, _, port = getattr(self, name).rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise ConfigError(f"{name} is {getattr(self, name)!r}; must be host:port, such as 127.0.0.1:50051")
        if not self.allow_non_loopback and not is_loopback(host):
            raise ConfigError(
                f"{name} listens beyond loopback ({host}); set allow_non_loopback = true if the network is trusted"
            )

    def _check_tls(self) -> None:
        """Which keys there are; the files are read when the router starts."""
        if self.tls_client_ca_path and not self.tls_certificate_path:
            raise ConfigError("tls_client_ca_path needs TLS: set tls_certificate_path and tls_key_path, too")
        if bool(self.tls_certificate_path) != bool(self.tls_key_path):
            missing = "tls_key_path" if self.tls_certificate_path else "tls_certificate_path"
            raise ConfigError(f"{missing} is empty; set both tls_certificate_path and tls_key_path, or neither")
        host = self.listen_address.rpartition(":")[0]
        is_in_clear = not (self.tls_certificate_path or self.allow_plaintext_api_keys or is_loopback(host))
        if self.api_keys_path and is_in_clear:
            raise ConfigError(
                f"listen_address is beyond loopback ({host}), where API keys (api_keys_path) would travel in clear; "
                "set tls_certificate_path and tls_key_path, or allow_plaintext_api_keys = true if something trusted "
                "in front of it has TLS"
            )


def _converted(value: Any, expected: Any) -> Any:
    if expected is float:
        return float(value)
    return tuple(value) if get_origin(expected) is tuple else value


def _is_of_type(value: object, expected: Any) -> bool:
    if get_origin(expected) is tuple:  # tuple[str, ...], the only one there is
        return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
    if isinstance(expected, UnionType):
        return any(_is_of_type(value, choice) for choice in get_args(expected))
    if expected is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, expected)


def _type_name(expected: Any) -> str:
    if get_origin(expected) is tuple:
        return "a list of strings"
    names = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", type(None): "absent"}
    if isinstance(expected, UnionType):
        return " or ".join(names[choice] for choice in get_args(expected))
    return names[expected]
