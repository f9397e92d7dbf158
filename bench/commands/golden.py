"""``baton bench golden``: a server whose answers are known to the millisecond, to try a load generator on."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_command(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "golden",
        help="a server with exactly known times, to judge a load generator by",
        description="Serves answers of known timing, as an OpenAI-compatible server and as Baton over gRPC, on "
        "loopback. GET /golden/records tells when each message was really sent.",
    )
    parser.add_argument("--http-port", type=int, default=52000, help="0: any (default: %(default)s)")
    parser.add_argument("--grpc-port", type=int, default=52001, help="0: any (default: %(default)s)")
    parser.add_argument("--model", default="golden", help="name of the served model (default: %(default)s)")
    parser.add_argument("--ttft-ms", type=float, default=50.0, help="time to first token (default: %(default)s)")
    parser.add_argument(
        "--ttft-us-per-prompt-token", type=float, default=0.0, help="and so much more a prompt token (default: 0)"
    )
    parser.add_argument("--gap-ms", type=float, default=10.0, help="between messages (default: %(default)s)")
    parser.add_argument("--jitter", type=float, default=0.0, help="share by which gaps vary, 0 to 1 (default: 0)")
    parser.add_argument(
        "--tokens-per-message", type=int, nargs="+", default=[1], help="repeated as a cycle (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from bench.generator.golden import GoldenScript
    from bench.generator.golden_server import run as run_server

    try:
        script = GoldenScript(
            ttft_s=arguments.ttft_ms / 1e3,
            ttft_per_prompt_token_s=arguments.ttft_us_per_prompt_token / 1e6,
            gap_s=arguments.gap_ms / 1e3,
            gap_jitter_share=arguments.jitter,
            tokens_per_message=tuple(arguments.tokens_per_message),
            seed=arguments.seed,
        )
    except ValueError as error:
        print(f"baton bench golden: {error}", file=sys.stderr)
        return 2
    try:
        run_server(script, http_port=arguments.http_port, grpc_port=arguments.grpc_port, model=arguments.model)
    except OSError as error:
        print(f"baton bench golden: {error}", file=sys.stderr)
        return 1
    return 0
