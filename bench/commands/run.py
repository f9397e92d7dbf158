"""``baton bench run``: sends a workload to a server in open loop, judges the run, writes it down, prints it."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.cli import exits
from bench.commands.traffic_options import (
    UsageError,
    add_traffic_options,
    make_plan_of,
    pacer_spelling,
    print_workloads,
    prompt_maker,
)

if TYPE_CHECKING:
    from bench.generator.baton_target import BatonTarget
    from bench.generator.openai_target import OpenAiTarget
    from bench.results.run_data import RunData
    from bench.results.slo import Slo
    from bench.traffic.prompts import PromptMaker

PREFLIGHT_TOKEN_COUNT = 8
PREFLIGHT_OUTPUT_COUNT = 4
REACH_LIMIT_S = 10.0
SLO_ALIASES = {"code": "code-completion"}


class CannotRun(Exception):
    """Nothing was sent; says why and what to do. ``code`` is the exit code."""

    def __init__(self, message: str, code: int = exits.UNAVAILABLE) -> None:
        super().__init__(message)
        self.code = code


def add_command(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "run",
        help="send a workload to a server and measure it",
        description="Sends a workload in open loop: every request at its intended time, every latency counted from "
        "it. Writes a directory with every request, a summary and an HTML report.",
        epilog="Exit codes: 0 the run is valid, 1 it is not (or nothing succeeded), 2 wrong command line, "
        "3 the server cannot be reached or does not serve, 130 interrupted. "
        "What makes a run invalid, and what each number means: docs/workbench/running.md",
    )
    target = parser.add_argument_group("target")
    target.add_argument(
        "--target",
        default="baton://127.0.0.1:50051",
        metavar="URL",
        help="baton://host:port or http://host:port (%(default)s)",
    )
    target.add_argument("--model", default="", help="model to ask for (default: the only one served)")
    target.add_argument(
        "--dialect",
        default="vllm",
        metavar="NAME",
        help="of an HTTP server: vllm (default), sglang, trtllm, tgi, llamacpp, ollama, lmstudio, generic",
    )
    target.add_argument("--endpoint", metavar="PATH", help="such as /v1/chat/completions (default: the dialect's)")
    target.add_argument("--api-key-env", metavar="NAME", help="environment variable with the API key to send")
    target.add_argument("--channels", type=int, default=1, metavar="N", help="connections to Baton (%(default)s)")
    target.add_argument(
        "--admin", metavar="HOST:PORT", help="Baton's admin address, for the timeline (default: the next port)"
    )
    target.add_argument(
        "--metrics-url", metavar="URL", help="Prometheus page of an HTTP server (default: /metrics of it)"
    )
    target.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="deadline of a request (%(default)g)"
    )
    target.add_argument(
        "--max-in-flight", type=int, metavar="N", help="close the loop at N requests; the wait counts as lag"
    )
    add_traffic_options(parser)
    rate = parser.add_argument_group("how much").add_mutually_exclusive_group()
    rate.add_argument("--rate", type=float, metavar="R", help="arrivals per second (default: the pacer's, or 1)")
    rate.add_argument("--rates", metavar="R,R,...", help="a sweep: one run a rate, each in a directory of its own")
    parser.add_argument(
        "--pacer",
        metavar="P",
        help="constant, poisson (default), gamma:cv=C, weibull:shape=K, ramp:A..B, steps:RxS,...",
    )
    parser.add_argument("--until-saturated", action="store_true", help="end a sweep at the first saturated rate")
    judged = parser.add_argument_group("how it is judged and kept")
    judged.add_argument(
        "--slo", default="chatbot", metavar="NAME", help="chatbot, code, voice, batch or rag (%(default)s)"
    )
    judged.add_argument("--slo-scale", type=float, default=1.0, metavar="X", help="factor of all bounds (default: 1)")
    judged.add_argument(
        "--out", type=Path, metavar="DIR", help="where the run goes (default: bench-runs/ and the time)"
    )
    judged.add_argument("--label", help="name of the system in reports (default: the target's kind)")
    judged.add_argument("--json", action="store_true", help="print the summary as JSON instead of tables")
    judged.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from baton import event_loop
    from bench.results.store import StoreError

    if arguments.list_workloads:
        print_workloads()
        return exits.OK
    directory = arguments.out or Path("bench-runs") / datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    try:
        rates = _rates(arguments)
        slo = _slo(arguments)
        prompts = prompt_maker(arguments)
        for rate_per_s in rates:  # a wrong option is said before anything is sent
            make_plan_of(arguments, prompts, pacer=pacer_spelling(arguments.pacer, rate_per_s))
        with event_loop.runner() as runner:
            outcome = runner.run(_run(arguments, directory, rates, slo, prompts))
    except UsageError as error:
        return _failed(str(error), exits.USAGE)
    except CannotRun as error:
        return _failed(str(error), error.code)
    except StoreError as error:
        return _failed(str(error), exits.FAILED)
    except KeyboardInterrupt:
        return _failed(f"interrupted; what was measured by then is in {directory}, marked invalid", exits.INTERRUPTED)
    return outcome


def _failed(message: str, code: int) -> int:
    print(f"baton bench run: {message}", file=sys.stderr)
    return code


def _rates(arguments: argparse.Namespace) -> list[float | None]:
    """One run each; None: the pacer's own. Raises ``UsageError``."""
    if arguments.trace is not None and (arguments.rate is not None or arguments.rates or arguments.pacer):
        raise UsageError("a trace has its own times: --trace-rate plays it faster")
    if arguments.rates is None:
        if arguments.until_saturated:
            raise UsageError("--until-saturated ends a sweep: name its rates with --rates")
        return [arguments.rate]
    try:
        rates = [float(rate) for rate in arguments.rates.split(",")]
    except ValueError:
        raise UsageError(f"--rates {arguments.rates}: numbers with commas between them are expected") from None
    if not rates or any(rate <= 0 for rate in rates) or len({f"{rate:g}" for rate in rates}) < len(rates):
        raise UsageError(f"--rates {arguments.rates}: different rates above 0 are expected")
    return list(rates)


def _slo(arguments: argparse.Namespace) -> Slo:
    from bench.results.slo import PRESETS

    name = SLO_ALIASES.get(arguments.slo, arguments.slo)
    if name not in PRESETS:
        raise UsageError(f"--slo {arguments.slo}: there are {', '.join(PRESETS)}")
    if not arguments.slo_scale > 0:
        raise UsageError("--slo-scale is above 0")
    return PRESETS[name].scaled(arguments.slo_scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reached:
    """A target that answered the preflight request."""

    target: BatonTarget | OpenAiTarget
    facts: Mapping[str, Any]
    label: str
    admin_address: str | None = None
    metrics_url: str | None = None
    worker_counts: Mapping[str, int] | None = None


async def _run(
    arguments: argparse.Namespace, directory: Path, rates: list[float | None], slo: Slo, prompts: PromptMaker
) -> int:
    from bench.generator.measure import Measurement, measure
    from bench.results.steady import SaturationVerdict
    from bench.results.summary import summarise

    reached = await _reach(arguments, prompts)
    measurement = Measurement(
        label=arguments.label or reached.label,
        target=reached.facts,
        model=reached.target.model,
        timeout_s=arguments.timeout,
        worker_counts=reached.worker_counts,
        max_in_flight=arguments.max_in_flight,
        slo=slo,
        slo_scale=arguments.slo_scale,
        admin_address=reached.admin_address,
        metrics_url=reached.metrics_url,
        is_quiet=arguments.quiet,
    )
    runs: list[RunData] = []
    summaries: list[dict[str, Any]] = []
    try:
        for rate_per_s in rates:
            plan = make_plan_of(arguments, prompts, pacer=pacer_spelling(arguments.pacer, rate_per_s))
            where = directory if len(rates) == 1 else directory / f"rate-{rate_per_s:g}"
            data = await measure(plan, reached.target, where, measurement)
            runs.append(data)
            summaries.append(summarise(data))
            _show(arguments, summaries[-1], data.facts, where)
            if arguments.until_saturated and summaries[-1]["saturation"]["verdict"] == SaturationVerdict.SATURATED:
                break
    finally:
        await reached.target.close()
    _finish(arguments, directory, runs, summaries, slo)
    return exits.OK if all(summary["validity"]["valid"] for summary in summaries) else exits.FAILED


def _show(arguments: argparse.Namespace, summary: Mapping[str, Any], facts: Mapping[str, Any], where: Path) -> None:
    if arguments.json:
        print(json.dumps(summary), flush=True)
        return
    from rich.console import Console

    from bench.generator.run_table import run_table

    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(run_table(summary, facts))
    console.print(f"kept          {where}", highlight=False, soft_wrap=True)


def _finish(
    arguments: argparse.Namespace, directory: Path, runs: list[RunData], summaries: list[dict[str, Any]], slo: Slo
) -> None:
    from bench.results.report import render

    page = directory / "report.html"
    page.write_text(render(runs), encoding="utf-8")
    if arguments.json:
        return
    from rich.console import Console

    from bench.generator.run_table import sweep_table

    console = Console(width=None if sys.stdout.isatty() else 140)
    if len(runs) > 1:
        console.print(sweep_table(summaries, slo.name))
    console.print(f"report        {page}", highlight=False, soft_wrap=True)


async def _reach(arguments: argparse.Namespace, prompts: PromptMaker) -> _Reached:
    """The target, once it has answered one small request. Raises ``CannotRun``, ``UsageError``."""
    scheme, _, rest = arguments.target.partition("://")
    if scheme == "baton" and rest:
        reached = await _reach_baton(arguments, rest.rstrip("/"))
    elif scheme in ("http", "https") and rest:
        reached = await _reach_http(arguments, prompts)
    else:
        raise UsageError(f"--target {arguments.target}: baton://host:port or http://host:port is expected")
    try:
        await _preflight(reached, prompts)
    except BaseException:
        await reached.target.close()
        raise
    return reached


async def _reach_baton(arguments: argparse.Namespace, address: str) -> _Reached:
    from baton.errors import BatonError
    from bench.generator.baton_target import BatonTarget

    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"--target baton://{address}: a host and a port are expected")
    target = BatonTarget(address, model=arguments.model, channel_count=arguments.channels)
    try:
        await target.check(timeout_s=REACH_LIMIT_S)
    except BatonError:
        await target.close()
        raise CannotRun(
            f"no Baton serves at {address}: start one with `baton up`, or name it with --target baton://host:port"
        ) from None
    admin = arguments.admin or f"{host}:{int(port) + 1}"
    counts = await _worker_counts(admin)
    return _Reached(
        target=target,
        facts={"kind": "baton", "address": address, "channel_count": arguments.channels},
        label="baton",
        admin_address=admin if counts is not None or arguments.admin else None,
        worker_counts=counts,
    )


async def _worker_counts(admin_address: str) -> dict[str, int] | None:
    """Workers by role; None where no admin service answers."""
    from contextlib import aclosing

    from baton.admin_client import AdminClient
    from baton.errors import BatonError

    try:
        async with (
            asyncio.timeout(REACH_LIMIT_S),
            AdminClient(admin_address) as client,
            aclosing(client.watch()) as views,
        ):
            async for view in views:
                roles = [worker.role for worker in view.workers]
                return {role: roles.count(role) for role in sorted(set(roles))}
    except (BatonError, TimeoutError):
        pass
    return None


async def _reach_http(arguments: argparse.Namespace, prompts: PromptMaker) -> _Reached:
    from bench.generator.openai_target import DIALECTS, OpenAiTarget
    from bench.generator.target import TargetError

    if arguments.dialect not in DIALECTS:
        raise UsageError(f"--dialect {arguments.dialect}: there are {', '.join(DIALECTS)}")
    api_key = None
    if arguments.api_key_env:
        api_key = os.environ.get(arguments.api_key_env)
        if not api_key:
            raise UsageError(f"--api-key-env {arguments.api_key_env}: that environment variable is not set")
    try:
        target = OpenAiTarget(
            arguments.target,
            arguments.model,
            dialect=arguments.dialect,
            endpoint=arguments.endpoint,
            text_of=None if arguments.token_ids else prompts.text,
            api_key=api_key,
        )
    except ValueError as error:
        raise UsageError(f"{error}; drop --token-ids") from None
    if not target.model:
        try:
            names = await target.models(timeout_s=REACH_LIMIT_S)
        except TargetError as error:
            await target.close()
            raise CannotRun(
                f"nothing that lists models answers at {target.url} ({error}): "
                "start it, correct --target, or name --model"
            ) from None
        if len(names) != 1:
            await target.close()
            raise UsageError(f"{target.url} serves {', '.join(names) or 'no model'}: choose with --model")
        target.model = names[0]
    return _Reached(
        target=target,
        facts={
            "kind": "openai",
            "address": target.url,
            "endpoint": target.endpoint,
            "dialect": target.dialect.name,
            "prompts": "token ids" if target.takes_token_ids else "text",
            "end_tokens": "ignored" if target.dialect.ignores_end else "end answers: lengths are the model's",
        },
        label=target.dialect.name,
        metrics_url=arguments.metrics_url or f"{target.url}/metrics",
    )


async def _preflight(reached: _Reached, prompts: PromptMaker) -> None:
    """One small request, so that a wrong model, dialect or key is said before the clock starts."""
    from bench.generator.target import TargetError
    from bench.traffic.plan import PlannedRequest

    request = PlannedRequest(
        index=-1,
        at_s=0.0,
        prompt_token_ids=prompts.tokens("preflight", PREFLIGHT_TOKEN_COUNT),
        output_token_count=PREFLIGHT_OUTPUT_COUNT,
    )
    try:
        async for _ in reached.target.generate(request, timeout_s=60.0):
            pass
    except TargetError as error:
        raise CannotRun(
            f"a first small request to {reached.facts['address']} ended with {error.outcome.value}: {error}. "
            "Nothing was measured. Check --model, --dialect, --endpoint and the server's own log"
        ) from None
