"""Baton's aggregated mode from a split configuration: the same workers, all of them decode workers.

Decode workers compute prompts themselves where there is no prefill worker. Pure text to text.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from typing import Any


def aggregated(toml_text: str) -> str:
    """``toml_text`` with the prefill workers turned into decode workers, on the same cores; comments are lost."""
    data = tomllib.loads(toml_text)
    prefill, decode = data.setdefault("prefill", {}), data.setdefault("decode", {})
    count = prefill.get("count", 1) + decode.get("count", 1)
    cores = [*prefill.pop("cores", []), *decode.get("cores", [])]
    if cores:
        decode["cores"] = cores
    prefill["count"], decode["count"] = 0, count
    return to_toml(data)


def to_toml(data: Mapping[str, Any]) -> str:
    """TOML of tables, strings, numbers, booleans and lists of them. Raises ``TypeError`` at anything else."""
    return "\n".join(_table(data, ())) + "\n"


def _table(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    lines = [f"[{'.'.join(json.dumps(part) for part in path)}]"] if path else []
    lines += [
        f"{json.dumps(key)} = {_value(value)}" for key, value in table.items() if not isinstance(value, Mapping)
    ]
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += _table(value, (*path, key))
    return lines


def _value(value: object) -> str:
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int | float):
        return repr(value)  # also inf and nan, which TOML spells alike
    if isinstance(value, list):
        return f"[{', '.join(_value(each) for each in value)}]"
    raise TypeError(f"no TOML for {type(value).__name__}")
