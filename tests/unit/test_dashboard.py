"""The dashboard and the scrape configuration name only what Baton has."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from baton.metrics import RouterMetrics, WorkerMetrics

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
FROM_SCRAPING = {"instance", "job", "pool", "le"}


def samples() -> dict[str, set[str]]:
    """Sample name to its labels, of everything a router and a worker export."""
    registry = CollectorRegistry()
    router, worker = RouterMetrics(registry), WorkerMetrics(registry, "p0")
    instruments = [one for owner in (router, worker) for one in vars(owner).values() if hasattr(one, "_labelnames")]
    labels = {one._name: set(one._labelnames) for one in instruments}
    return {
        family.name + suffix: labels.get(family.name, set())
        for family in registry.collect()
        for suffix in SUFFIXES[family.type]
    }


def expressions() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana" / "baton-phases.json").read_text(encoding="utf-8"))
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def faults_of(expression: str, known: dict[str, set[str]]) -> list[str]:
    names = set(re.findall(r"\bbaton_[a-z_]+", expression))
    faults = [f"no metric {name}" for name in sorted(names - known.keys())]
    labels = set().union(FROM_SCRAPING, *(known.get(name, set()) for name in names))
    for group in re.findall(r"\bby \(([^)]*)\)", expression):
        faults += [f"no label {label}" for label in re.split(r",\s*", group) if label not in labels]
    for group in re.findall(r"\{([^}]*)\}", expression):
        faults += [f"no label {label}" for label in re.findall(r"(\w+)\s*[=!]", group) if label not in labels]
    return faults if names else ["names no metric"]


@pytest.mark.parametrize("expression", expressions())
def test_every_expression_names_metrics_and_labels_that_exist(expression: str) -> None:
    assert faults_of(expression, samples()) == []


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        ("rate(baton_requests[1m])", "no metric baton_requests"),
        ("sum by (role) (rate(baton_requests_total[1m]))", "no label role"),
        ('baton_requests_total{kind="x"}', "no label kind"),
        ("up", "names no metric"),
    ],
)
def test_a_wrong_expression_is_caught(expression: str, fault: str) -> None:
    assert faults_of(expression, samples()) == [fault]


def test_every_phase_instrument_of_the_router_is_shown() -> None:
    shown = " ".join(expressions())
    router = RouterMetrics(CollectorRegistry())
    names = [one._name for one in (router.phase, router.ttft, router.itl, router.tpot, router.e2e, router.requests)]
    assert [name for name in names if name not in shown] == []


def test_panels_do_not_overlap_and_have_their_own_ids() -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "baton-phases.json").read_text(encoding="utf-8"))
    panels: list[dict[str, Any]] = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in cells) < 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells


def test_scraped_ports_are_those_of_the_default_cluster() -> None:
    text = (DEPLOY / "prometheus" / "prometheus.yml").read_text(encoding="utf-8")
    targets = set(re.findall(r'targets: \["([^"]+)"\]', text))
    cluster = tomllib.loads((DEPLOY / "baton.toml").read_text(encoding="utf-8"))
    router = re.search(r'metrics_address = "([^"]+)"', (DEPLOY / "baton.toml").read_text(encoding="utf-8"))
    assert router is not None
    workers = {f"127.0.0.1:{cluster[role]['metrics_port']}" for role in ("prefill", "decode")}
    assert targets == {router[1], *workers}
