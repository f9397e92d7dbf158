"""Who calls: an API key's name and tenant where the server asks for keys, else the tenant that the call names.

Pure but for ``ApiKeys.load``. A key is never kept, only its SHA-256 digest, and never told: not in errors, not in
logs, not in a ``repr``.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baton.errors import BatonError, no_api_key, permission_denied

AUTHORIZATION_KEY = "authorization"
"""The metadata that carries ``Bearer KEY``."""
MAX_KEY_BYTES = 512
MAX_API_KEY_COUNT = 10_000

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_TENANT = re.compile(r"[A-Za-z0-9_.-]{0,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_KEY_FIELDS = frozenset({"sha256", "tenant"})


class ApiKeysError(ValueError):
    """The file of keys cannot be used; the message names file, key and fix."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a call is from. ``name``: the API key's; empty where the server asks for none."""

    name: str
    tenant: str

    @property
    def identity(self) -> str:
        """What a resume token is bound to. A key that was replaced under the same name is the same caller."""
        return f"key:{self.name}" if self.name else f"tenant:{self.tenant}"


@dataclass(frozen=True, slots=True)
class ApiKey:
    name: str
    tenant: str
    digest: str = field(repr=False)
    """SHA-256 of the key, hexadecimal."""


class ApiKeys:
    """The keys a server knows, by digest. Immutable."""

    def __init__(self, keys: tuple[ApiKey, ...]) -> None:
        self._by_digest = {key.digest: key for key in keys}

    def __repr__(self) -> str:
        return f"<ApiKeys {len(self._by_digest)} keys>"

    @classmethod
    def load(cls, path: Path) -> ApiKeys:
        """From a .toml or .json file: a table for each name, with ``sha256`` and, unless it is the common one,
        ``tenant``. Raises ``ApiKeysError``."""
        try:
            text = path.read_text(encoding="utf-8")
            data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        except OSError as error:
            raise ApiKeysError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ApiKeysError(f"{path} is malformed: {type(error).__name__}") from None  # its text may quote a key
        try:
            return cls.parse(data)
        except ApiKeysError as error:
            raise ApiKeysError(f"{path}: {error}") from error

    @classmethod
    def parse(cls, data: Any) -> ApiKeys:
        """Raises ``ApiKeysError``."""
        if not isinstance(data, Mapping) or not data:
            raise ApiKeysError("has no keys; give a table [NAME] with sha256 for each, or leave api_keys_path out")
        if len(data) > MAX_API_KEY_COUNT:
            raise ApiKeysError(f"has {len(data)} keys; at most {MAX_API_KEY_COUNT}")
        keys = tuple(_api_key(name, entry) for name, entry in data.items())
        names: dict[str, str] = {}
        for key in keys:
            if key.digest in names:
                raise ApiKeysError(f"[{key.name}] has the key of [{names[key.digest]}]; make one for each")
            names[key.digest] = key.name
        return cls(keys)

    def find(self, key: str) -> ApiKey | None:
        """Looked up by digest, so that the time it takes says nothing of the keys there are."""
        if not key or len(key) > MAX_KEY_BYTES:
            return None
        digest = hashlib.sha256(key.encode()).hexdigest()
        found = self._by_digest.get(digest)
        return found if found is not None and hmac.compare_digest(found.digest, digest) else None


class Callers:
    """Says who calls. One per router."""

    def __init__(self, keys: ApiKeys | None) -> None:
        """None: no key is asked for, and a caller is the tenant that it names."""
        self._keys = keys

    @property
    def asks_for_keys(self) -> bool:
        return self._keys is not None

    def take(self, keys: ApiKeys) -> None:
        """For every call from now on; those that were let in go on."""
        self._keys = keys

    def identify(self, authorization: str | None, tenant: str = "") -> Caller:
        """``authorization``: the metadata's value, or None; ``tenant``: as the request names it, or empty.

        Raises UNAUTHENTICATED, or PERMISSION_DENIED where the request names another tenant than the key's.
        """
        if self._keys is None:
            return Caller("", tenant)
        scheme, _, sent = (authorization or "").partition(" ")
        key = self._keys.find(sent.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            raise no_api_key()
        if tenant and tenant != key.tenant:
            raise _other_tenant(key)
        return Caller(key.name, key.tenant)


def _other_tenant(key: ApiKey) -> BatonError:
    return permission_denied(
        f"the request names another tenant than that of API key {key.name!r}; leave tenant empty, or say "
        f"{key.tenant!r}"
    )


def _api_key(name: str, entry: Any) -> ApiKey:
    if not _NAME.fullmatch(name):
        raise ApiKeysError(f"[{name[:64]!r}]: a name has letters, digits and _ . -, 1 to 64")
    if not isinstance(entry, Mapping):
        raise ApiKeysError(f"[{name}] must be a table with sha256 and tenant")
    unknown = sorted(set(entry) - _KEY_FIELDS)
    if unknown:
        raise ApiKeysError(f"[{name}] {unknown[0]}: is not known; known: {', '.join(sorted(_KEY_FIELDS))}")
    digest, tenant = entry.get("sha256"), entry.get("tenant", "")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ApiKeysError(f"[{name}] sha256: must be 64 hexadecimal digits, the digest of the key and not the key")
    if not isinstance(tenant, str) or not _TENANT.fullmatch(tenant):
        raise ApiKeysError(f"[{name}] tenant: must have letters, digits and _ . -, at most 64")
    return ApiKey(name, tenant, digest)
