"""The file of API keys is followed: what changes counts, and what cannot be used changes nothing."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from router import key_file
from router.callers import ApiKeys, ApiKeysError
from router.key_file import KeyFile


def table(*keys: str) -> str:
    return "".join(f'[{key}]\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n' for key in keys)


def looked_twice(file: KeyFile) -> ApiKeys | None:
    """Once to see the change, once more to see that it rests."""
    assert file.look() is None
    return file.look()


def test_a_file_that_does_not_change_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys.toml").write_text(table("one"))
    file = KeyFile(tmp_path / "keys.toml")
    monkeypatch.setattr(ApiKeys, "load", None)
    assert [file.look() for _ in range(3)] == [None] * 3
    assert file.keys.find("one")


def test_keys_that_are_added_and_taken_out_are_found_and_not_found(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(table("one", "two"))
    file = KeyFile(path)
    path.write_text(table("two", "three"))
    keys = looked_twice(file)
    assert keys is file.keys is not None
    assert [bool(keys.find(key)) for key in ("one", "two", "three")] == [False, True, True]
    assert file.look() is None


def test_a_file_that_is_still_being_written_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(table("one"))
    file = KeyFile(path)
    for count in range(1, 4):
        path.write_text(table(*[f"key-{index}" for index in range(count)]))
        assert file.look() is None
    assert file.keys.find("one")
    keys = file.look()
    assert keys is not None
    assert keys.find("key-2")


def test_another_file_put_in_its_place_with_the_same_size_and_time_is_seen(tmp_path: Path) -> None:
    path, other = tmp_path / "keys.toml", tmp_path / "new.toml"
    path.write_text(table("one"))
    file = KeyFile(path)
    other.write_text(table("two"))
    times = path.stat()
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(path)
    keys = looked_twice(file)
    assert keys is not None
    assert keys.find("two")


Writing = Callable[[Path, int, str], None]


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> Writing:
    """Of the next ``count`` reads, each finds what a writer has written by then who began after the look; what he
    writes last is whole."""
    load = ApiKeys.load

    def begin(path: Path, count: int, half: str) -> None:
        def raced(read: Path) -> ApiKeys:
            nonlocal count
            if not count:
                return load(read)
            count -= 1
            path.write_text(half)
            try:
                return load(read)
            finally:
                path.write_text(table("one", "two") + "\n" * count)  # of another size each time: clocks tick slowly

        monkeypatch.setattr(ApiKeys, "load", raced)

    return begin


@pytest.mark.parametrize("half", [table("two"), "[two", ""])
def test_a_writer_who_begins_between_the_look_and_the_read_is_waited_for(
    tmp_path: Path, half: str, writing: Writing
) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(table("one"))
    file = KeyFile(path)
    path.write_text(table("one", "changed"))
    assert file.look() is None
    writing(path, 1, half)
    assert file.look() is None, "half a file is neither taken nor told"
    assert file.keys.find("one")
    keys = looked_twice(file)
    assert keys is not None
    assert [bool(keys.find(key)) for key in ("one", "two", "changed")] == [True, True, False]
    assert file.look() is None


@pytest.mark.parametrize("half", [table("two"), "[two"])
def test_at_the_start_too_a_file_that_is_written_meanwhile_is_read_again(
    tmp_path: Path, half: str, writing: Writing
) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(table("one"))
    writing(path, key_file.MAX_READ_COUNT - 1, half)
    assert KeyFile(path).keys.find("one")
    writing(path, key_file.MAX_READ_COUNT, half)
    with pytest.raises(ApiKeysError, match="is being written; start again"):
        KeyFile(path)


async def test_what_nobody_expected_is_told_without_its_words_and_the_file_is_still_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(key_file, "LOOK_EVERY_S", 0)
    path = tmp_path / "keys.toml"
    path.write_text(table("one"))
    file = KeyFile(path)
    answers: list[BaseException | ApiKeys | None] = [OSError("a-secret"), RuntimeError("a-secret"), None, file.keys]

    def look() -> ApiKeys | None:
        answer = answers.pop(0) if answers else None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(file, "look", look)
    taken: list[ApiKeys] = []
    took = asyncio.Event()

    def take(keys: ApiKeys) -> None:
        taken.append(keys)
        took.set()

    following = asyncio.create_task(file.follow(take))
    with caplog.at_level(logging.WARNING, logger=key_file.__name__):
        waiting = asyncio.create_task(took.wait())
        await asyncio.wait((waiting, following), return_when=asyncio.FIRST_COMPLETED)
    assert not following.done()
    assert taken == [file.keys]
    told = [record.getMessage() for record in caplog.records]
    assert [("OSError" in each, "RuntimeError" in each) for each in told] == [(True, False), (False, True)]
    assert "a-secret" not in caplog.text
    following.cancel()
    with suppress(asyncio.CancelledError):
        await following
    assert following.cancelled()


@pytest.mark.parametrize("text", ["", "[one", "[" * 50_000, '[one]\nsha256 = "short"\n', None])
def test_a_file_that_cannot_be_used_leaves_the_keys_and_is_told_once(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(table("one"))
    file = KeyFile(path)
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ApiKeysError) as told:
        looked_twice(file)
    assert str(path) in str(told.value)
    assert file.look() is None
    assert file.keys.find("one")
    path.write_text(table("two"))
    keys = looked_twice(file)
    assert keys is not None
    assert keys.find("two"), "what is mended counts"


def test_keys_that_cannot_be_read_at_the_start_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ApiKeysError, match="cannot read"):
        KeyFile(tmp_path / "nowhere.toml")
