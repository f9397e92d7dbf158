"""How tokens that an answer has already travel into an engine, in the request's extra arguments. Pure.

vLLM's requests have no field for them. Whoever makes the request puts them there; the connector's two sides, the
scheduler's and the worker's, each take them from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

EMITTED_ARG = "baton_emitted_token_ids"
STRUCTURE_FAILED = "baton_structure_failed"
"""In what a finished request brings back: its structure was given up, so its end means nothing."""


def extra_args(emitted: Sequence[int], transfer: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What ``SamplingParams.extra_args`` must be; ``transfer`` is the connector's own, see ``transfer_params``."""
    arguments: dict[str, Any] = {}
    if transfer is not None:
        arguments["kv_transfer_params"] = dict(transfer)
    if emitted:
        arguments[EMITTED_ARG] = list(emitted)
    return arguments or None


def emitted_token_ids(arguments: Mapping[str, Any] | None) -> list[int]:
    """The inverse. Raises ``ValueError`` for anything that ``extra_args`` does not make."""
    token_ids = (arguments or {}).get(EMITTED_ARG, [])
    if not isinstance(token_ids, list) or not all(type(each) is int and each >= 0 for each in token_ids):
        raise ValueError("the emitted tokens are not a list of token ids")
    return token_ids
