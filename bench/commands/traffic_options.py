"""The options that say what is sent, and the plan they make: shared by the verbs that send or simulate traffic.

Imports nothing heavy before a plan is made, so that help and usage errors come at once.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.traffic.plan import Plan
    from bench.traffic.prompts import PromptMaker

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_DURATION_S = 60.0
_PACER = re.compile(r"^(?P<name>constant|poisson|gamma|weibull)(?::(?P<rest>.*))?$")


class UsageError(ValueError):
    """What was asked for does not fit together; says what to change."""


def add_traffic_options(parser: argparse.ArgumentParser) -> None:
    """``--workload`` or ``--trace``, the pacer, and all that shapes them. Rates are the verb's own."""
    what = parser.add_argument_group("what is sent")
    kind = what.add_mutually_exclusive_group()
    kind.add_argument("--workload", default="chat", metavar="NAME", help="by name (default: %(default)s)")
    kind.add_argument("--trace", type=Path, metavar="FILE", help="replay a trace file instead")
    what.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of the workload in place of its default, such as answer_tokens=lognormal:150,sigma=0.8",
    )
    what.add_argument("--list-workloads", action="store_true", help="print workloads and their parameters, and stop")
    what.add_argument("--scale", type=float, default=1.0, metavar="X", help="factor of all lengths (default: 1)")
    what.add_argument(
        "--context", type=int, default=8192, metavar="N", help="most tokens of prompt and answer (%(default)s)"
    )
    what.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="of everything drawn (default: a new one each time, since a server's cache knows the old prompts)",
    )
    what.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="folder with the tokenizer.json of the served model (default: the model of `make model`)",
    )
    what.add_argument(
        "--token-ids",
        metavar="LOW..HIGH",
        help="make prompts of these ids, last included, without a tokenizer: where the server takes token ids",
    )
    when = parser.add_argument_group("when")
    when.add_argument(
        "--duration",
        type=float,
        metavar="S",
        help=f"of the arrivals (default: the pacer's own, or {DEFAULT_DURATION_S:g})",
    )
    when.add_argument("--requests", type=int, metavar="N", help="only the first so many arrivals")
    when.add_argument("--trace-start", type=float, default=0.0, metavar="S", help="slice of the trace: from")
    when.add_argument("--trace-end", type=float, metavar="S", help="slice of the trace: to")
    when.add_argument("--trace-rate", type=float, default=1.0, metavar="X", help="play a trace X times as fast")
    when.add_argument("--trace-keep", type=float, default=1.0, metavar="P", help="keep each request with this chance")
    when.add_argument(
        "--trace-jitter",
        default="auto",
        metavar="RULE",
        help="auto: spread arrivals within the tick of a coarse clock if there is one; none; or the tick in seconds",
    )
    when.add_argument(
        "--trace-too-long",
        choices=("cut", "drop"),
        default="cut",
        help="what to do with requests beyond --context (default: %(default)s)",
    )


def print_workloads() -> None:
    """Every workload with its parameters, defaults and meanings."""
    import dataclasses

    from bench.traffic.workloads import WORKLOADS

    for name, workload in WORKLOADS.items():
        print(f"{name}: arrivals are {workload.arrivals}")
        for field in dataclasses.fields(workload):
            print(f"    {field.name}={_spelled(getattr(workload, field.name))}  {field.metadata['what']}")


def _spelled(value: object) -> object:
    facts = getattr(value, "facts", None)
    return value if facts is None else facts().get("spelling", facts())


def default_tokenizer() -> Path:
    """Of the model that ``make model`` prepares."""
    home = Path(os.environ.get("BATON_HOME") or Path.home() / ".cache" / "baton").expanduser()
    return home / "models" / DEFAULT_MODEL


def prompt_maker(arguments: argparse.Namespace) -> PromptMaker:
    """Raises ``UsageError`` when there is no tokenizer."""
    from bench.traffic.prompts import PromptMaker

    if arguments.token_ids is not None:
        low, dots, high = arguments.token_ids.partition("..")
        if not (dots and low.isdigit() and high.isdigit()):
            raise UsageError(f"--token-ids {arguments.token_ids}: LOW..HIGH is expected, such as 3..31999")
        try:
            return PromptMaker.without_tokenizer(int(high) + 1, first_token_id=int(low))
        except ValueError as error:
            raise UsageError(f"--token-ids {arguments.token_ids}: {error}") from None
    directory = arguments.tokenizer or default_tokenizer()
    try:
        return PromptMaker(directory.expanduser())
    except ValueError as error:
        raise UsageError(f"{error}; --tokenizer names the folder") from None


def pacer_spelling(text: str | None, rate_per_s: float | None) -> str:
    """The pacer as ``parse_pacer`` reads it. ``text``: of ``--pacer``; ``rate_per_s`` takes the place of its rate.

    ``None, 2`` is poisson:2; ``"gamma:cv=3", 2`` and ``"gamma:9,cv=3", 2`` are gamma:2,cv=3. Raises ``UsageError``.
    """
    if rate_per_s is None:
        return text or "poisson:1"
    match = _PACER.match(text or "poisson")
    if match is None:
        raise UsageError(f"--pacer {text} has no one rate that --rate or --rates could set; write it into the pacer")
    named = [part for part in (match["rest"] or "").split(",") if "=" in part]
    return f"{match['name']}:{','.join([f'{rate_per_s:g}', *named])}"


def seed_of(arguments: argparse.Namespace) -> int:
    """The seed that was asked for, or a new one; the run's facts have it."""
    return secrets.randbelow(2**31) if arguments.seed is None else int(arguments.seed)


def make_plan_of(arguments: argparse.Namespace, prompts: PromptMaker, *, pacer: str, seed: int) -> Plan:
    """The plan that the options ask for. Raises ``UsageError``."""
    import math

    from bench.traffic.pacers import parse_pacer
    from bench.traffic.traces import plan_from_trace, read_trace
    from bench.traffic.workloads import make_plan

    if arguments.requests is not None and arguments.requests < 1:
        raise UsageError(f"--requests {arguments.requests}: at least one arrival is expected")
    parameters = {}
    for one in arguments.set:
        name, equals, value = one.partition("=")
        if not equals:
            raise UsageError(f"--set {one}: NAME=VALUE is expected")
        parameters[name] = value
    try:
        if arguments.trace is not None:
            if parameters:
                raise UsageError("--set changes a workload, and --trace replays a file: drop one of them")
            return plan_from_trace(
                read_trace(arguments.trace),
                prompts,
                seed=seed,
                start_s=arguments.trace_start,
                end_s=_trace_end(arguments, math.inf),
                rate_scale=arguments.trace_rate,
                keep_share=arguments.trace_keep,
                length_scale=arguments.scale,
                jitter=arguments.trace_jitter,
                too_long=arguments.trace_too_long,
                context_token_count=arguments.context,
                request_limit=arguments.requests,
            )
        parsed = parse_pacer(pacer)
        has_end = arguments.duration is not None or parsed.natural_duration_s is not None
        return make_plan(
            arguments.workload,
            pacer=parsed,
            duration_s=arguments.duration if has_end else DEFAULT_DURATION_S,
            seed=seed,
            prompts=prompts,
            scale=arguments.scale,
            context_token_count=arguments.context,
            arrival_limit=arguments.requests,
            parameters=parameters,
        )
    except UsageError:
        raise
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None


def _trace_end(arguments: argparse.Namespace, otherwise: float) -> float:
    if arguments.trace_end is not None:
        return float(arguments.trace_end)
    if arguments.duration is not None:
        # Of the arrivals as they are played.
        return float(arguments.trace_start + arguments.duration * arguments.trace_rate)
    return otherwise
