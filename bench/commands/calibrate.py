"""``baton bench calibrate``: measures the engines of a configuration and writes what a simulation needs of them."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.cli import exits

if TYPE_CHECKING:
    from bench.simulation.observed import Observed
    from bench.simulation.profile import Profile
    from fleet.config import FleetConfig

DEFAULT_CONFIG = Path("deploy/baton.toml")
DEFAULT_OUT = Path("bench-runs/profile.toml")
_MILLI = 1000.0


def add_command(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "calibrate",
        help="measure step times and overheads of the engines, for simulations",
        description="Starts the cluster of a configuration on free ports, with a scheduler that notes every engine "
        "step; asks prompts one at a time and streams in waves; then starts the same workers once more, aggregated. "
        "Fits the cost model, overheads, the link and contention between workers, and writes a profile for `baton "
        "bench simulate --profile`. Run it on a machine that does nothing else.",
        epilog="Exit codes: 0 written, 1 the cluster failed or too little could be observed, 2 wrong command line or "
        "file. What is measured and how: docs/workbench/calibration.md",
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=DEFAULT_CONFIG,
        metavar="FILE",
        help="TOML of the cluster (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, metavar="FILE", help="the profile (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="a minute and a half instead of under five, and coarser")
    parser.add_argument("--seed", type=int, default=1, help="of prompts, lengths and order (default: %(default)s)")
    parser.add_argument(
        "--no-aggregated",
        action="store_true",
        help="leave out the second start: how two like workers hinder each other",
    )
    parser.add_argument("--raw", type=Path, metavar="FILE", help="keep every step and answer, a JSON line each")
    parser.add_argument(
        "--fit-from", type=Path, metavar="FILE", help="measure nothing; fit what --raw kept (of the same --config)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from bench.simulation.fit import FitImpossible, make_profile
    from bench.simulation.observed import from_lines
    from bench.simulation.profile import write_profile
    from fleet.config import load_config
    from fleet.toml_table import ConfigError

    try:
        config = load_config(arguments.config)
        _check(config)
        observed = None
        if arguments.fit_from is not None:
            observed = from_lines(arguments.fit_from.read_text().splitlines())
    except (ConfigError, OSError, ValueError) as error:
        print(f"baton: {error}", file=sys.stderr)
        return exits.USAGE
    began = time.monotonic()
    try:
        if observed is None:
            observed = asyncio.run(_observe(config, arguments))
        profile = make_profile(
            observed,
            seed=arguments.seed,
            kv_bytes_per_token=_kv_bytes_per_token(config),
            provenance=_provenance(config, arguments, observed, time.monotonic() - began),
        )
    except KeyboardInterrupt:
        return exits.INTERRUPTED
    except FitImpossible as error:
        print(f"baton: {error}", file=sys.stderr)
        return exits.FAILED
    except Exception as error:  # whatever ends a fleet or a request ends the calibration, and says so in a line
        print(f"baton: calibration failed: {type(error).__name__}: {error}", file=sys.stderr)
        return exits.FAILED
    write_profile(arguments.out, profile)
    _print(profile)
    print(f"\n{arguments.out}")
    return exits.OK


def _check(config: FleetConfig) -> None:
    """Raises ``ValueError`` for a cluster whose steps one cost model cannot describe, or that has no step log."""
    from baton.request import Role

    kinds = {engine.kind for role, engine in config.engines.items() if config.pools[role].count}
    if kinds != {"vllm"}:
        raise ValueError('calibrate: needs real engines (kind = "vllm"); the cost of simulated ones is configured')
    if config.pools[Role.PREFILL].count and (
        config.pools[Role.PREFILL].cores_per_worker != config.pools[Role.DECODE].cores_per_worker
    ):
        raise ValueError("calibrate: give workers of both roles as many cores; one cost model is fitted to both")


async def _observe(config: FleetConfig, arguments: argparse.Namespace) -> list[Observed]:
    from baton.request import Role
    from bench.simulation.observed import to_lines
    from bench.simulation.probe import aggregated, describe, observe

    clusters = [config]
    worker_count = sum(pool.count for pool in config.pools.values())
    if config.pools[Role.PREFILL].count and worker_count > 1 and not (arguments.no_aggregated or arguments.quick):
        clusters.append(aggregated(config))
    observed = []
    for number, cluster in enumerate(clusters):
        _say(f"{describe(cluster)}: starting")
        observed.append(
            await observe(cluster, is_quick=arguments.quick, seed=arguments.seed + 1000 * number, say=_say)
        )
        if arguments.raw is not None:  # after each: what a later cluster's failure must not take along
            arguments.raw.parent.mkdir(parents=True, exist_ok=True)
            arguments.raw.write_text("".join(f"{line}\n" for line in to_lines(observed)))
    return observed


def _kv_bytes_per_token(config: FleetConfig) -> int:
    """2 (key and value) * layers * KV heads * head size * bytes of a number."""
    import json

    from baton.request import Role

    model = json.loads((config.model.directory / "config.json").read_text())
    heads = model.get("num_key_value_heads", model["num_attention_heads"])
    head_size = model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"]
    number_bytes = 4 if config.engines[Role.DECODE].dtype == "float32" else 2
    return int(2 * model["num_hidden_layers"] * heads * head_size * number_bytes)


def _provenance(
    config: FleetConfig, arguments: argparse.Namespace, observed: list[Observed], took_s: float
) -> dict[str, Any]:
    from baton.request import Role

    engine = config.engines[Role.DECODE]
    return {
        "made_by": "baton bench calibrate" + (" --quick" if arguments.quick else ""),
        "took_s": round(took_s),
        "model": config.model.name,
        "dtype": engine.dtype,
        "cores_per_worker": config.pools[Role.DECODE].cores_per_worker,
        "block_token_count": engine.block_token_count,
        "kv_cache_bytes": engine.kv_cache_bytes,
        "max_running_count": engine.max_running_count,
        "max_batched_token_count": {role.value: config.engines[role].max_batched_token_count for role in Role},
        "enforce_eager": engine.enforce_eager,
        "clusters": [each.cluster for each in observed],
        "answer_count": sum(len(each.answers) for each in observed),
        "machine": dict(observed[0].machine) if observed else {},
    }


def _print(profile: Profile) -> None:
    cost, overheads, contention = profile.costs["decode"], profile.overheads, profile.contention
    p, d = cost.prefill, cost.decode
    print(
        f"prefill step  {p.base_s * _MILLI:.1f} ms + {p.per_token_s * _MILLI:.3f} ms a token "
        f"+ {p.per_token_squared_s * 1e9:.0f} ns a token squared"
    )
    print(
        f"decode step   {d.base_s * _MILLI:.1f} ms + {d.per_sequence_s * _MILLI:.3f} ms a sequence "
        f"+ {d.per_sequence_beyond_knee_s * _MILLI:.3f} ms each beyond {d.knee_sequence_count} "
        f"+ {d.per_context_token_s * 1e6:.2f} us a token of context"
    )
    print(
        f"link          {profile.link.latency_s * _MILLI:.2f} ms + bytes at {profile.link.bytes_per_s / 1e9:.2f} GB/s"
    )
    for name, unit in (
        ("admit", "prompt token"),
        ("first_token", "prompt token"),
        ("token", "sequence"),
        ("handoff", "prompt token"),
        ("pulled_step", "pull"),
    ):
        line = getattr(overheads, name)
        print(f"{name:<13} {line.base_s * _MILLI:.2f} ms + {line.per_unit_s * 1e6:.2f} us a {unit}")
    print(
        "speed lost    "
        f"prefill by prefill {contention.prefill_by_prefill:.1%}, "
        f"prefill by decode {contention.prefill_by_decode:.1%}, "
        f"decode by prefill {contention.decode_by_prefill:.1%}, decode by decode {contention.decode_by_decode:.1%}"
    )
    print(
        f"disturbed     {profile.provenance['disturbed_share']:.0%} of steps: {profile.provenance['disturbed_steps']}"
    )
    print("\nerror on samples the fit had not seen")
    for name, error in profile.fit.items():
        print(
            f"  {name:<12} n {error.sample_count:<6} mean {error.mape:6.1%}  bias {error.bias:+6.1%}  "
            f"worst {error.worst:7.1%}  R2 {error.r_squared:.4f}"
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="baton bench")
    add_command(parser.add_subparsers(required=True))
    options = parser.parse_args(arguments)
    return int(options.run(options))


if __name__ == "__main__":
    sys.exit(main(["calibrate", *sys.argv[1:]]))
