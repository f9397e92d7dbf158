"""What README, ARCHITECTURE and the decisions name exists: files, make targets, metrics, commands, configuration."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from baton.__main__ import _parser
from baton.metrics import RouterMetrics, WorkerMetrics

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / "README.md", ROOT / "ARCHITECTURE.md"),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "decisions").glob("*.md")),
    *sorted((ROOT / "docs" / "workbench").glob("*.md")),
    *sorted((ROOT / "docs" / "benchmarks").glob("*.md")),
    *sorted((ROOT / "docs" / "api").glob("*.md")),
    *(ROOT / "examples" / "README.md", ROOT / "proto" / "released" / "README.md"),
]
ROOMS = ("baton", "kvtransfer", "engine", "prefill_worker", "decode_worker", "router", "fleet", "bench", "deploy")
MADE_LATER = (".venv", ".baton", "~", "$")
"""Not in the tree: the environment, a cluster's state, the model."""


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def quoted(page: Path) -> list[str]:
    outside_blocks = re.sub(r"```.*?```", "", text_of(page), flags=re.S)
    return re.findall(r"`([^`\n]+)`", outside_blocks)


def missing_paths(page: Path) -> list[str]:
    """Quoted words that look like a path from the root, and links, that lead nowhere."""
    words = [word for word in quoted(page) if re.fullmatch(r"[\w.*-]+(/[\w.*-]*)+", word)]
    wanted = [word for word in words if not word.startswith(MADE_LATER) and word.split("/")[0] in (
        *ROOMS, "proto", "tests", "docs")]  # fmt: skip
    links = re.findall(r"\]\(([^)#:]+)\)", text_of(page))
    return [word for word in wanted if not list(ROOT.glob(word.rstrip("/")))] + [
        link for link in links if not (page.parent / link).exists()
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_and_link_exists(page: Path) -> None:
    assert missing_paths(page) == []


def test_a_missing_path_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("see `router/no_such.py`, `router/handoff.py`, `/metrics` and [this](gone.md)", encoding="utf-8")
    assert missing_paths(page) == ["router/no_such.py", "gone.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_exists(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.M))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", text_of(page), flags=re.M))
    assert named - targets == set()


def test_every_target_that_help_lists_is_phony() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.+)$", makefile, flags=re.M)
    assert set(re.findall(r"^([a-z-]+):", makefile, flags=re.M)) == set(phony.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_metric_exists(page: Path) -> None:
    registry = CollectorRegistry()
    RouterMetrics(registry), WorkerMetrics(registry, "p0")
    known = {family.name for family in registry.collect()}
    named = {word.split("{")[0].removesuffix("_total") for word in quoted(page) if re.match(r"baton_[a-z]+_", word)}
    assert {name for name in named if not name.endswith(("_client", "_serve"))} - known == set()


def test_every_command_in_the_readme_is_a_command() -> None:
    known = set(re.findall(r"^    (\w+)", _parser(True).format_help(), flags=re.M))
    named = set(re.findall(r"(?:^|`)baton (\w+)", text_of(ROOT / "README.md"), flags=re.M))
    assert named, "the README shows commands"
    assert named - known == set()


def test_the_python_example_uses_what_there_is() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", text_of(ROOT / "README.md"), flags=re.S)
    tree = ast.parse(example)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
    from baton.client import BatonClient, PhaseTimings
    from baton.request import Usage

    assert hasattr(BatonClient, "chat")
    assert "time_to_first_token_s" in PhaseTimings.__slots__
    assert "output_token_count" in Usage.__slots__


def test_configuration_files_in_the_readme_are_all_there_are() -> None:
    named = set(re.findall(r"`deploy/([\w-]+\.toml)`", text_of(ROOT / "README.md")))
    assert named == {path.name for path in (ROOT / "deploy").glob("*.toml")}
