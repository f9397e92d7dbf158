"""Resume tokens: what opens, what does not, and that nobody learns why."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import hmac
import json
import random

import pytest

from baton.errors import BatonError, Reason
from baton.secret import resume_key
from router.resuming.resume_token import MAX_TOKEN_BYTES, ResumeClaim, open_claim, seal_claim

SECRET = bytes(range(32))
CLAIM = ResumeClaim("gen-1", "key:chat", "ab" * 32, 1_000.0, 1_300.5, 1_330.5)


def denied(token: str, secret: bytes = SECRET) -> str:
    with pytest.raises(BatonError) as caught:
        open_claim(token, secret)
    assert caught.value.reason is Reason.RESUME_DENIED
    return caught.value.message


def sealed(body: bytes) -> str:
    mac = hmac.new(resume_key(SECRET), b"brt1." + body, hashlib.sha256).digest()
    return "brt1." + base64.urlsafe_b64encode(mac + body).rstrip(b"=").decode()


def test_what_was_sealed_opens_in_the_same_cluster_and_in_no_other() -> None:
    token = seal_claim(CLAIM, SECRET)
    assert open_claim(token, SECRET) == CLAIM
    assert len(token) < MAX_TOKEN_BYTES / 2
    denied(token, bytes(32))


def test_every_changed_character_is_denied_with_the_same_words() -> None:
    token = seal_claim(CLAIM, SECRET)
    words = set()
    for index in range(len(token)):
        for other in random.Random(index).sample("ABCabc019-_.=", 4):
            changed = token[:index] + other + token[index + 1 :]
            if changed != token and index < len(token) - 1:  # the last one has bits that mean nothing
                words.add(denied(changed))
    assert len(words) == 1


@pytest.mark.parametrize("token", ["", "brt1.", "brt1.AAAA", "x" * 10_000, "brt1.ä", "brt1." + "!" * 50])
def test_what_is_no_token_is_denied(token: str) -> None:
    denied(token)


@pytest.mark.parametrize(
    "change",
    [
        {"generation_id": ""},
        {"generation_id": 3},
        {"identity": None},
        {"request_digest": "ab"},
        {"deadline_at": "soon"},
        {"deadline_at": -1},
        {"expires_at": True},
        {"more": 1},
    ],
)
def test_a_seal_is_no_proof_of_a_version_without_bugs(change: dict[str, object]) -> None:
    body = {**dataclasses.asdict(CLAIM), **change}
    denied(sealed(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()))
    denied(sealed(b"[]"))
    denied(sealed(b"{"))


def test_what_would_not_open_is_not_sealed() -> None:
    with pytest.raises(ValueError, match="would not open again"):
        seal_claim(dataclasses.replace(CLAIM, generation_id="a b"), SECRET)


def test_it_is_over_at_its_end() -> None:
    assert not CLAIM.is_over(1_330.4)
    assert CLAIM.is_over(1_330.5)
