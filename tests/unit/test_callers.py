"""Who calls: keys by digest, tenants, and what is wrong with a file of keys."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from baton.errors import BatonError, Reason
from router.callers import ApiKeys, ApiKeysError, Callers

KEY = "bk-correct-horse"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()
OTHER = hashlib.sha256(b"other").hexdigest()
KEYS = ApiKeys.parse({"chat": {"sha256": DIGEST, "tenant": "shop"}, "batch": {"sha256": OTHER}})


def test_without_keys_a_caller_is_the_tenant_that_it_names() -> None:
    callers = Callers(None)
    assert not callers.asks_for_keys
    assert callers.identify(None, "shop").identity == "tenant:shop"
    assert callers.identify("Bearer whatever", "").identity == "tenant:"


@pytest.mark.parametrize("sent", [f"Bearer {KEY}", f"bearer {KEY}", f"BEARER  {KEY} "])
def test_with_keys_a_caller_is_its_key_and_has_the_keys_tenant(sent: str) -> None:
    caller = Callers(KEYS).identify(sent)
    assert (caller.identity, caller.tenant) == ("key:chat", "shop")
    assert Callers(KEYS).identify(sent, "shop") == caller


def test_a_key_and_a_tenant_of_the_same_name_are_not_the_same_caller() -> None:
    assert Callers(KEYS).identify(f"Bearer {KEY}").identity != Callers(None).identify(None, "chat").identity


@pytest.mark.parametrize(
    "sent",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Basic {KEY}",
        KEY,
        f"Bearer {KEY}x",
        f"Bearer {DIGEST}",
        "Bearer " + "x" * 9999,
    ],
)
def test_whoever_has_no_known_key_is_not_let_in(sent: str | None) -> None:
    with pytest.raises(BatonError) as caught:
        Callers(KEYS).identify(sent)
    assert caught.value.reason is Reason.UNAUTHENTICATED
    assert KEY not in str(caught.value)


def test_another_tenant_than_the_keys_is_not_permitted() -> None:
    with pytest.raises(BatonError) as caught:
        Callers(KEYS).identify(f"Bearer {KEY}", "bank")
    assert caught.value.reason is Reason.PERMISSION_DENIED
    assert "'shop'" in caught.value.message
    assert KEY not in caught.value.message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "has no keys"),
        ([], "has no keys"),
        ({"a b": {"sha256": DIGEST}}, "a name has letters"),
        ({"a": "key"}, "[a] must be a table"),
        ({"a": {"sha256": DIGEST, "tennant": "x"}}, "[a] tennant: is not known"),
        ({"a": {}}, "[a] sha256: must be 64 hexadecimal digits"),
        ({"a": {"sha256": KEY}}, "[a] sha256: must be 64 hexadecimal digits"),
        ({"a": {"sha256": DIGEST.upper()}}, "[a] sha256"),
        ({"a": {"sha256": DIGEST, "tenant": "x y"}}, "[a] tenant"),
        ({"a": {"sha256": DIGEST}, "b": {"sha256": DIGEST}}, "[b] has the key of [a]"),
    ],
)
def test_a_wrong_file_is_refused_by_the_name_of_what_is_wrong(data: Any, words: str) -> None:
    with pytest.raises(ApiKeysError) as caught:
        ApiKeys.parse(data)
    assert words in str(caught.value)
    assert KEY not in str(caught.value)


def test_a_file_is_toml_or_json(tmp_path: Path) -> None:
    toml, other = tmp_path / "keys.toml", tmp_path / "keys.json"
    toml.write_text(f'[chat]\nsha256 = "{DIGEST}"\ntenant = "shop"\n')
    other.write_text(json.dumps({"chat": {"sha256": DIGEST, "tenant": "shop"}}))
    for path in (toml, other):
        assert Callers(ApiKeys.load(path)).identify(f"Bearer {KEY}").tenant == "shop"
    with pytest.raises(ApiKeysError, match="cannot read"):
        ApiKeys.load(tmp_path / "nowhere.toml")
    toml.write_text(f"[chat\n{KEY}")
    with pytest.raises(ApiKeysError, match="is malformed") as caught:
        ApiKeys.load(toml)
    assert KEY not in str(caught.value)


def test_nothing_shows_a_key_or_its_digest() -> None:
    assert repr(KEYS) == "<ApiKeys 2 keys>"
    assert DIGEST not in repr(KEYS.find(KEY))
