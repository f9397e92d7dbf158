"""``baton key``: what it prints is what the server reads, and nothing more."""

from __future__ import annotations

import hashlib
import json
import tomllib

import pytest

from baton.__main__ import main
from router.callers import ApiKeys, Callers


def test_the_table_lets_the_key_in_and_does_not_hold_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key", "chat", "--tenant", "shop"]) == 0
    said = capsys.readouterr()
    key = said.err.split()[-1]
    assert key.startswith("bk-")
    assert key not in said.out
    caller = Callers(ApiKeys.parse(tomllib.loads(said.out))).identify(f"Bearer {key}")
    assert (caller.identity, caller.tenant) == ("key:chat", "shop")


def test_no_two_keys_are_alike_and_json_says_all_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    keys = []
    for _ in range(2):
        assert main(["key", "chat", "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["sha256"] == hashlib.sha256(said["key"].encode()).hexdigest()
        assert list(said) == ["event", "name", "key", "sha256", "tenant"]
        keys.append(said["key"])
    assert len(set(keys)) == 2


@pytest.mark.parametrize("arguments", [["a b"], [""], ["a.b"], ["x" * 65], ["a", "--tenant", "b c"]])
def test_a_name_that_the_server_would_refuse_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["key", *arguments]) == 2
    assert "must match" in capsys.readouterr().err
