"""How far off the simulation is: the same plans measured on real clusters and simulated, and the page that says so.

    python -m bench.simulation.accuracy --measure DIR --profile FILE     # measures both clusters, then compares
    python -m bench.simulation.accuracy --profile FILE RUN RUN...        # compares runs that were measured before

Unattended, the former takes about a quarter of an hour on two cores; with --quick two minutes. What is an error, and
when a goal is claimed: ``errors.py``. Misses do not change the exit code: 0 when every run was valid, 1 otherwise, 2
for wrong options.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from bench.generator.environment import environment_facts
from bench.results.run_data import RunData
from bench.results.store import StoreError, read_run
from bench.simulation.errors import GOODPUT_SLO, errors_of, render_errors
from bench.simulation.held_out import CONFIGURATIONS, QUICK, measure_all
from bench.simulation.observe import ReplayError, replay
from bench.simulation.profile import Profile, ProfileError, read_profile
from bench.simulation.simulate import profile_digest, with_counts
from bench.traffic.prompts import PromptMaker
from fleet.config import ConfigError, FleetConfig, load_config

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "benchmarks" / "simulator.md"
RAW = ROOT / "docs" / "evidence" / "simulator.json"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, _raise_exit)  # a terminated run still ends its servers
    try:
        return _main(options)
    except (ConfigError, ProfileError, ReplayError, StoreError, OSError, ValueError) as error:
        print(f"accuracy: {error}", file=sys.stderr)
        return 2


def _main(options: argparse.Namespace) -> int:
    config = load_config(options.config)
    profile = read_profile(options.profile)
    prompts = PromptMaker(config.model.directory)
    failures: list[str] = []
    if options.measure is not None:
        chosen = QUICK if options.quick else CONFIGURATIONS
        duration_s = options.duration or (15.0 if options.quick else 45.0)
        runs, failures = measure_all(chosen, options.config, options.measure, duration_s, prompts)
        named = [(run.configuration.name, run.directory) for run in runs if run.repeats is None]
        repeats = [(run.configuration.name, run.repeats, run.directory) for run in runs if run.repeats is not None]
    else:
        named = [(directory.name, directory) for directory in options.runs]
        repeats = []
    result = compare(named, repeats, profile, config, prompts, replayed=replay)
    result |= {"is_quick": bool(options.quick), "failures": failures, "environment": _environment()}
    page, raw = _outputs(options)
    for path, text in ((page, render_page(result)), (raw, json.dumps(result, indent=1, sort_keys=True) + "\n")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print(render_page(result))
    print(f"written to {page} and {raw}")
    is_good = bool(result["configurations"]) and not failures
    return 0 if is_good and all(row["is_valid"] for row in result["configurations"]) else 1


def compare(
    named: Sequence[tuple[str, Path]],
    repeats: Sequence[tuple[str, Path, Path]],
    profile: Profile,
    config: FleetConfig,
    prompts: PromptMaker,
    *,
    replayed: Callable[..., RunData],
) -> dict[str, Any]:
    """Simulates each run and tells the errors; ``repeats`` are pairs of measured runs. Raises ``ReplayError``."""
    pairs = []
    simulated_s = cpu_s = 0.0
    durations: set[float] = set()
    for name, directory in named:
        measured = read_run(directory)
        counts = measured.facts.get("worker_counts")
        if not counts:
            raise ReplayError(f"{directory} does not say how many workers it had: measure it through a Baton target")
        cluster = with_counts(config, prefill=counts.get("prefill", 0), decode=counts.get("decode", 0))
        simulated = replayed(measured, profile, cluster, prompts)
        simulated_s += simulated.facts["simulation"]["simulated_s"]
        cpu_s += simulated.facts["simulation"]["cpu_s"]
        durations.add(measured.facts["plan"]["duration_s"])
        pairs.append((name, measured, simulated))
    return {
        **errors_of(pairs),
        "repeats": errors_of([(name, read_run(first), read_run(again)) for name, first, again in repeats]),
        "model": config.model.name,
        "duration_s": max(durations, default=0.0),
        "slo_scale": max((pair[1].facts.get("slo_scale") or 1.0 for pair in pairs), default=1.0),
        "profile_sha256": profile_digest(profile),
        "profile_provenance": dict(profile.provenance),
        "speed": {"simulated_s": simulated_s, "cpu_s": max(cpu_s, 1e-9)},
    }


def _environment() -> dict[str, Any]:
    facts = environment_facts()
    return {
        key: facts[key] for key in ("at", "cpu_model", "core_count", "memory_gib", "kernel", "packages", "commit")
    }


def _outputs(options: argparse.Namespace) -> tuple[Path, Path]:
    suffix = "-quick" if options.quick else ""
    page = options.page or PAGE.with_name(f"{PAGE.stem}{suffix}.md")
    raw = options.raw or RAW.with_name(f"{RAW.stem}{suffix}.json")
    return page, raw


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.simulation.accuracy", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="directories of measured runs")
    parser.add_argument("--measure", type=Path, metavar="DIR", help="measure the held-out configurations into DIR")
    parser.add_argument("--quick", action="store_true", help="two configurations of 15 s in place of twelve of 45 s")
    parser.add_argument("--duration", type=float, metavar="S", help="of the arrivals of each configuration")
    parser.add_argument("--profile", type=Path, required=True, metavar="FILE", help="of `baton bench calibrate`")
    parser.add_argument("--config", type=Path, default=ROOT / "deploy" / "baton.toml", metavar="FILE")
    parser.add_argument("--page", type=Path, metavar="FILE", help="where the page goes (default: docs/benchmarks)")
    parser.add_argument("--raw", type=Path, metavar="FILE", help="where its JSON goes (default: docs/evidence)")
    options = parser.parse_args(arguments)
    if bool(options.runs) == (options.measure is not None):
        parser.error("name runs that were measured, or --measure DIR to measure some: one of the two")
    if options.duration is not None and not options.duration > 0:
        parser.error("--duration is above 0")
    return options


def _raise_exit(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(143)


def render_page(result: Mapping[str, Any]) -> str:
    """The page in docs/benchmarks: what was done, how far off it was, and how far off the machine is from itself."""
    environment, speed = result["environment"], result["speed"]
    quick = " (quick run)" if result["is_quick"] else ""
    lines = [
        f"# Simulator against reality{quick}",
        "",
        f"{len(result['configurations'])} held-out configurations of {result['model']}, each measured for "
        f"{result['duration_s']:g} s of arrivals on a real cluster and then simulated with the identical plan. "
        f"{environment['core_count']} cores of {environment['cpu_model']}; commit {environment['commit']}; profile "
        f"{result['profile_sha256'][:12]}, calibrated under other loads. Made by "
        "`python -m bench.simulation.accuracy --measure`; every figure, unrounded, is in the JSON of the same "
        "name in docs/evidence.",
        "",
        "An error is simulated / measured - 1 (goodput: difference of shares, under the "
        f"{GOODPUT_SLO} SLO times {result['slo_scale']:g}), over the requests that the measured run's own rules call "
        "steady. A goal is claimed if the mean of the absolute errors is within it. A p99 of so few requests is near "
        "their maximum.",
        "",
        f"Simulated {speed['simulated_s']:.0f} s in {speed['cpu_s']:.2f} s of one core's time: "
        f"{speed['simulated_s'] / speed['cpu_s']:.0f} times as fast as real time.",
        "",
        render_errors(result),
    ]
    for invalid in (row for row in result["configurations"] if not row["is_valid"]):
        lines += ["", f"{invalid['name']} was invalid: {'; '.join(invalid['invalid_reasons'])}"]
    for failure in result["failures"]:
        lines += ["", f"Not measured: {failure}"]
    if result["repeats"]["configurations"]:
        lines += [
            "",
            "## The machine against itself",
            "",
            "The same configurations measured again on the same cluster, with other words of the same lengths at the "
            "same times: a simulation cannot be expected nearer to a run than another run is.",
            "",
            render_errors(result["repeats"]),
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
