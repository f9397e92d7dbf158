"""What a decode engine is told in order to pull KV, checked field by field.

Two kinds: NIXL's (what vLLM's connector reads) and the simulated engine's. vLLM trusts these completely: a
missing key, a wrong type or a block id out of range kills its engine core, and a host is dialled as it stands.
So nothing reaches an engine that did not pass here. Pure: no I/O, no clock, no vllm.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from baton.errors import ticket_refused

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")

_ENGINE_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,256}")  # no comma: ids travel comma-separated in NIXL's heartbeats
_HANDLE = re.compile(r"[A-Za-z0-9_.:/-]{1,256}")
_MAX_KV_BYTES = 1 << 50
_MAX_NONCE = (1 << 64) - 1
MAX_SLOT_COUNT = 1 << 16


@dataclass(frozen=True, slots=True)
class TransferLimits:
    """What a puller accepts. Addresses never come from a public request, and still only these are dialled."""

    allowed_hosts: Collection[str] = LOOPBACK_HOSTS
    max_token_count: int = 1 << 20
    max_block_count: int = 16_384
    """Over all groups of one request."""
    max_group_count: int = 8
    max_block_id: int = (1 << 31) - 1
    max_parallel_size: int = 1
    """Largest tensor, pipeline or decode-context parallel size of a peer. Others are untried, so refused."""
    block_token_count: int | None = None
    """With it, a single group must have exactly the blocks that its tokens need."""

    def __post_init__(self) -> None:
        if isinstance(self.allowed_hosts, str) or not self.allowed_hosts:
            raise ValueError('allowed_hosts: give a list of host names or addresses, such as ["127.0.0.1"]')
        object.__setattr__(self, "allowed_hosts", tuple(self.allowed_hosts))
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name != "allowed_hosts" and value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{each.name}: is {value!r}; give a whole number of at least 1")

    @classmethod
    def of(cls, value: TransferLimits | Mapping[str, Any]) -> TransferLimits:
        """Limits, or a table of a configuration file that describes them. Raises ``ValueError``."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ValueError("transfer: give a table")
        known = [each.name for each in fields(cls)]
        for key in value:
            if key not in known:
                raise ValueError(f"transfer.{key}: is not known; known here: {', '.join(known)}")
        try:
            return cls(**value)
        except ValueError as error:
            raise ValueError(f"transfer.{error}") from None


@dataclass(frozen=True, slots=True)
class NixlParams:
    """Where vLLM's NIXL connector finds the KV of one prefilled request. Field names are vLLM's."""

    remote_engine_id: str
    remote_request_id: str
    remote_host: str
    remote_port: int
    remote_block_ids: tuple[tuple[int, ...], ...] = field(repr=False)
    """Per KV cache group, in order. Block 0 is vLLM's null block and never carries KV."""
    remote_num_tokens: int
    tp_size: int
    dcp_size: int
    pp_size: int
    transfer_mode: str
    hold_slot: int
    """Which of the prefill engine's hold records vouches for the KV (``kvtransfer/holds.py``)."""
    hold_nonce: int = field(repr=False)
    """What that record must say when the KV has been read."""

    KIND = "nixl"

    @property
    def token_count(self) -> int:
        """Prompt tokens whose KV is held."""
        return self.remote_num_tokens

    def to_vllm(self) -> dict[str, Any]:
        """Exactly the keys the connector reads, as plain JSON values."""
        params: dict[str, Any] = {name: getattr(self, name) for name in _NIXL_KEYS}
        params["remote_block_ids"] = [list(group) for group in self.remote_block_ids]
        return params

    def to_engine(self) -> dict[str, Any]:
        """What ``DecodeJob.pull`` carries."""
        return self.to_vllm()

    def to_wire(self) -> dict[str, Any]:
        return {"kind": self.KIND, **self.to_vllm()}


@dataclass(frozen=True, slots=True)
class SimulatedParams:
    """Where the simulated engine finds the KV of one prefilled request."""

    engine_id: str
    handle: str
    token_count: int
    kv_bytes: int

    KIND = "simulated"

    def to_engine(self) -> dict[str, Any]:
        """What ``DecodeJob.pull`` carries."""
        return self.to_wire()

    def to_wire(self) -> dict[str, Any]:
        return {"kind": self.KIND, **{name: getattr(self, name) for name in _SIMULATED_KEYS}}


TransferParams = NixlParams | SimulatedParams

_NIXL_KEYS = tuple(f.name for f in fields(NixlParams))
_SIMULATED_KEYS = tuple(f.name for f in fields(SimulatedParams))


def validate_transfer_params(params: Mapping[str, Any], limits: TransferLimits) -> TransferParams:
    """Checks every field. ``params`` as in a ticket, with ``kind``, or as an engine made them (NIXL's have none).

    Raises TICKET_REFUSED with check ``params`` for an unknown kind, a missing, unknown or malformed field, a host
    that is not allowed, or blocks that do not match the tokens.
    """
    if not isinstance(params, Mapping):
        raise ticket_refused("params", "not a mapping")
    given = dict(params)
    kind = given.pop("kind", NixlParams.KIND)
    if kind == NixlParams.KIND:
        return _nixl(given, limits)
    if kind == SimulatedParams.KIND:
        return _simulated(given, limits)
    raise ticket_refused("params", "unknown kind")


def _nixl(given: Mapping[str, Any], limits: TransferLimits) -> NixlParams:
    _require_keys(given, _NIXL_KEYS)
    params = NixlParams(
        remote_engine_id=_text(given, "remote_engine_id", _ENGINE_ID),
        remote_request_id=_text(given, "remote_request_id", _REQUEST_ID),
        remote_host=_one_of(given, "remote_host", limits.allowed_hosts.__contains__),
        remote_port=_integer(given, "remote_port", 1, 65_535),
        remote_block_ids=_block_ids(given["remote_block_ids"], limits),
        remote_num_tokens=_integer(given, "remote_num_tokens", 1, limits.max_token_count),
        tp_size=_integer(given, "tp_size", 1, limits.max_parallel_size),
        dcp_size=_integer(given, "dcp_size", 1, limits.max_parallel_size),
        pp_size=_integer(given, "pp_size", 1, limits.max_parallel_size),
        transfer_mode=_one_of(given, "transfer_mode", lambda mode: mode == "pull"),
        hold_slot=_integer(given, "hold_slot", 0, MAX_SLOT_COUNT - 1),
        hold_nonce=_integer(given, "hold_nonce", 1, _MAX_NONCE),
    )
    if limits.block_token_count is not None and len(params.remote_block_ids) == 1:
        needed = -(-params.remote_num_tokens // limits.block_token_count)
        if len(params.remote_block_ids[0]) != needed:
            raise ticket_refused(
                "params",
                f"remote_block_ids has {len(params.remote_block_ids[0])} blocks for {params.remote_num_tokens} "
                f"tokens, which need {needed}",
            )
    return params


def _simulated(given: Mapping[str, Any], limits: TransferLimits) -> SimulatedParams:
    _require_keys(given, _SIMULATED_KEYS)
    return SimulatedParams(
        engine_id=_text(given, "engine_id", _ENGINE_ID),
        handle=_text(given, "handle", _HANDLE),
        token_count=_integer(given, "token_count", 1, limits.max_token_count),
        kv_bytes=_integer(given, "kv_bytes", 0, _MAX_KV_BYTES),
    )


def _require_keys(given: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    for key in keys:
        if key not in given:
            raise ticket_refused("params", f"{key} is missing")
    if len(given) != len(keys):
        raise ticket_refused("params", "unknown field")  # not named: it is the sender's text


def _integer(given: Mapping[str, Any], key: str, least: int, most: int) -> int:
    value = given[key]
    if type(value) is not int:  # a bool is an int, and vLLM would take it for one
        raise ticket_refused("params", f"{key} is not an integer")
    if not least <= value <= most:
        raise ticket_refused("params", f"{key} is not within {least} to {most}")
    return value


def _text(given: Mapping[str, Any], key: str, pattern: re.Pattern[str]) -> str:
    return _one_of(given, key, lambda text: pattern.fullmatch(text) is not None)


def _one_of(given: Mapping[str, Any], key: str, is_allowed: Callable[[str], bool]) -> str:
    value = given[key]
    if type(value) is not str or not is_allowed(value):
        raise ticket_refused("params", f"{key} is not allowed")
    return value


def _block_ids(groups: Any, limits: TransferLimits) -> tuple[tuple[int, ...], ...]:
    if not isinstance(groups, list | tuple) or not 1 <= len(groups) <= limits.max_group_count:
        raise ticket_refused("params", f"remote_block_ids is not a list of 1 to {limits.max_group_count} groups")
    if not all(isinstance(group, list | tuple) and group for group in groups):
        raise ticket_refused("params", "remote_block_ids has a group that is not a list of blocks")
    if sum(map(len, groups)) > limits.max_block_count:
        raise ticket_refused("params", f"remote_block_ids has more than {limits.max_block_count} blocks")
    for group in groups:
        for block_id in group:
            if type(block_id) is not int or not 1 <= block_id <= limits.max_block_id:
                raise ticket_refused("params", f"remote_block_ids has an id not within 1 to {limits.max_block_id}")
        if len(set(group)) != len(group):
            raise ticket_refused("params", "remote_block_ids names a block twice")
    return tuple(tuple(group) for group in groups)
