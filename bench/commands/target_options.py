"""The options that say what is measured, and how it is reached: shared by the verbs that send traffic.

Whatever is wrong with a target is said before the clock starts: a first small request proves address, model, dialect
and key.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from baton.cli import exits
from bench.commands.traffic_options import UsageError

if TYPE_CHECKING:
    from bench.generator.baton_target import BatonTarget
    from bench.generator.openai_target import OpenAiTarget
    from bench.traffic.prompts import PromptMaker

PREFLIGHT_TOKEN_COUNT = 8
PREFLIGHT_OUTPUT_COUNT = 4
PREFLIGHT_LIMIT_S = 60.0
REACH_LIMIT_S = 10.0


class CannotRun(Exception):
    """Nothing was sent; says why and what to do. ``code`` is the exit code."""

    def __init__(self, message: str, code: int = exits.UNAVAILABLE) -> None:
        super().__init__(message)
        self.code = code


def add_target_options(parser: argparse.ArgumentParser) -> None:
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


def check_target_options(arguments: argparse.Namespace) -> None:
    """Raises ``UsageError`` for what no target could be asked with."""
    for option, url in (("--target", arguments.target), ("--metrics-url", arguments.metrics_url or "")):
        if "@" in url.rpartition("://")[2].partition("/")[0]:
            # Addresses go into facts and reports: what is in them must not be a secret. Nor does this repeat it.
            raise UsageError(
                f"{option} has a user or a password in it, and the run's facts and report would show them: "
                "put a key into an environment variable and name that with --api-key-env"
            )
    if not 0 < arguments.timeout < math.inf:
        raise UsageError(f"--timeout {arguments.timeout:g}: seconds above 0 are expected")
    if arguments.channels < 1:
        raise UsageError(f"--channels {arguments.channels}: at least one connection is needed")
    if arguments.max_in_flight is not None and arguments.max_in_flight < 1:
        raise UsageError(f"--max-in-flight {arguments.max_in_flight}: at least one request must be allowed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """A target that answered the preflight request."""

    target: BatonTarget | OpenAiTarget
    facts: Mapping[str, Any]
    label: str
    admin_address: str | None = None
    metrics_url: str | None = None
    worker_counts: Mapping[str, int] | None = None


async def reach(arguments: argparse.Namespace, prompts: PromptMaker) -> Reached:
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


async def _reach_baton(arguments: argparse.Namespace, address: str) -> Reached:
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
    return Reached(
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


async def _reach_http(arguments: argparse.Namespace, prompts: PromptMaker) -> Reached:
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
    return Reached(
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


async def _preflight(reached: Reached, prompts: PromptMaker) -> None:
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
        async for _ in reached.target.generate(request, timeout_s=PREFLIGHT_LIMIT_S):
            pass
    except TargetError as error:
        raise CannotRun(
            f"a first small request to {reached.facts['address']} ended with {error.outcome.value}: {error}. "
            "Nothing was measured. Check --model, --dialect, --endpoint and the server's own log"
        ) from None
