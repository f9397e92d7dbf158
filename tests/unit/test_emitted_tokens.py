"""Emitted tokens on their way into an engine."""

from __future__ import annotations

from typing import Any

import pytest

from kvtransfer.emitted_tokens import EMITTED_ARG, emitted_token_ids, extra_args


def test_what_goes_in_comes_out() -> None:
    assert emitted_token_ids(extra_args((5, 0, 7), None)) == [5, 0, 7]
    arguments = extra_args((5,), {"do_remote_prefill": True})
    assert arguments is not None
    assert arguments["kv_transfer_params"] == {"do_remote_prefill": True}
    assert emitted_token_ids(arguments) == [5]


def test_nothing_emitted_and_nothing_to_transfer_is_nothing_at_all() -> None:
    assert extra_args((), None) is None
    assert emitted_token_ids(None) == []
    assert emitted_token_ids(extra_args((), {"do_remote_decode": True})) == []


@pytest.mark.parametrize("wrong", [(1, 2), "12", [1, -1], [True], [1.0], None])
def test_anything_else_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="not a list of token ids"):
        emitted_token_ids({EMITTED_ARG: wrong})
