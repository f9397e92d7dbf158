"""What the commands' arguments mean: they become a client, a prompt, and what may be said of a generation.

Raises ``UsageError`` for what cannot be sent; ranges are the server's to check, which names every broken one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from baton.call_proto import GenerateOptions
from baton.channels import DEFAULT_ADDRESS
from baton.client import BatonClient
from baton.prompts import TemplateArgument, chat_prompt
from baton.request import (
    ChatMessage,
    ChatPrompt,
    OutputOptions,
    Prompt,
    Sampling,
    StopConditions,
    Structure,
    StructureKind,
    TextPrompt,
    TokenPrompt,
    ToolChoice,
)
from baton.tls import (
    CA_VARIABLE,
    CERTIFICATE_VARIABLE,
    KEY_VARIABLE,
    SERVER_NAME_VARIABLE,
    TLS_VARIABLE,
    Tls,
)

API_KEY_VARIABLE = "BATON_API_KEY"


class UsageError(ValueError):
    """The command line asks for what cannot be; the message says what to write instead."""


def add_connection_arguments(parser: argparse.ArgumentParser, *, timeout_s: float | None = None) -> None:
    """Where, as whom, and for how long. ``timeout_s``: the default of --timeout; None: there is none."""
    parser.add_argument(
        "--address",
        default=DEFAULT_ADDRESS,
        help="host:port of the router; several with commas (default %(default)s)",
    )
    parser.add_argument(
        "--api-key-file",
        metavar="FILE",
        help=f"the API key, where the server asks for one (default: the variable {API_KEY_VARIABLE})",
    )
    _add_tls_arguments(parser.add_argument_group("TLS"))
    if timeout_s is not None:
        parser.add_argument(
            "--timeout", type=float, default=timeout_s, metavar="S", help="seconds for each call (%(default)g)"
        )


def _add_tls_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--tls",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=f"speak TLS; alone it trusts the public CAs (default: if a file or name is given, or {TLS_VARIABLE}=1)",
    )
    for option, variable, what in (
        ("--tls-ca", CA_VARIABLE, "the CA of the server's certificate"),
        ("--tls-certificate", CERTIFICATE_VARIABLE, "our certificate, where the server asks for one"),
        ("--tls-key", KEY_VARIABLE, "its private key"),
    ):
        group.add_argument(option, metavar="FILE", help=f"{what}, PEM (default: the variable {variable})")
    group.add_argument(
        "--tls-server-name",
        metavar="NAME",
        help=f"the name in the server's certificate, if not the address's host (default: {SERVER_NAME_VARIABLE})",
    )
    group.add_argument(
        "--allow-plaintext-api-key",
        action="store_true",
        help="send the API key without TLS to another machine, where anybody in between can read it",
    )


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line, instead of text")


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``generate`` and ``chat`` share."""
    add_connection_arguments(parser, timeout_s=120.0)
    parser.add_argument("--model", default="", help="model to ask for (default: the only one served)")
    parser.add_argument("--tenant", default="", help="share cached prefixes within this tenant only")
    parser.add_argument(
        "--session-id", default="", metavar="ID", help="requests of one session find each other's prefix"
    )
    parser.add_argument("--correlation-id", default="", metavar="ID", help="for the server's log line")
    parser.add_argument("--priority", type=int, default=0, metavar="N", help="larger is served first; -100 to 100")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the answer when the connection is cut or the router restarts",
    )
    _add_sampling_arguments(parser.add_argument_group("how tokens are drawn"))
    _add_stop_arguments(parser.add_argument_group("when the answer ends"))
    _add_structure_arguments(parser.add_argument_group("what the answer must match").add_mutually_exclusive_group())
    _add_template_arguments(parser.add_argument_group("tools and templates"))


def _add_sampling_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="from the likeliest tokens of this mass"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="from the K likeliest tokens; 0: all")
    parser.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="none below this fraction of the likeliest"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="makes a drawn answer reproducible")
    for name in ("presence", "frequency"):
        per = "each token the answer has" if name == "presence" else "the same, per occurrence"
        parser.add_argument(
            f"--{name}-penalty", type=float, default=0.0, metavar="X", help=f"off the logit of {per}; -2 to 2"
        )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="divides the logits of tokens of prompt and answer; 0.01 to 100, 1 is none",
    )
    parser.add_argument(
        "--logit-bias",
        type=_bias,
        action="append",
        default=[],
        metavar="ID=X",
        help="added to a token's logit; may be repeated",
    )
    parser.add_argument(
        "--allowed-token-ids", type=_ids, default=(), metavar="IDS", help="draw only these, as 5,17,42"
    )
    parser.add_argument(
        "--bad-token-ids",
        type=_ids,
        action="append",
        default=[],
        metavar="IDS",
        help="never this sequence; may be repeated",
    )


def _add_stop_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--max-tokens", type=int, metavar="N", help="most tokens to generate (default: the context)")
    parser.add_argument("--min-tokens", type=int, default=0, metavar="N", help="fewest tokens to generate")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop sequence; may be repeated")
    parser.add_argument(
        "--stop-token-id", type=int, action="append", default=[], metavar="ID", help="stop token; may be repeated"
    )
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the model's own end")


def _add_structure_arguments(parser: argparse._MutuallyExclusiveGroup) -> None:
    parser.add_argument("--json-schema", metavar="FILE", help="this JSON schema")
    parser.add_argument("--json-object", action="store_true", help="any JSON object")
    parser.add_argument("--regex", metavar="RE", help="this regular expression")
    parser.add_argument("--choice", action="append", default=[], metavar="TEXT", help="one of these; may be repeated")
    parser.add_argument("--grammar", metavar="FILE", help="this grammar (Lark or GBNF)")


def _add_template_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--tools", metavar="FILE", help="what the model may call: a JSON list of {name, description, parameters}"
    )
    parser.add_argument(
        "--tool-choice", metavar="HOW", help="auto (default), none, required, or the name of the tool it must call"
    )
    parser.add_argument(
        "--template-argument",
        action="append",
        default=[],
        type=_template_argument,
        metavar="NAME=JSON",
        help="a value for the model's template, as enable_thinking=false; may be repeated",
    )
    parser.add_argument(
        "--keep-reasoning", action="store_true", help="leave a reasoning model's thinking in the text"
    )


def addresses_of(arguments: argparse.Namespace) -> list[str]:
    return [each.strip() for each in arguments.address.split(",") if each.strip()]


def api_key_of(arguments: argparse.Namespace) -> str | None:
    """Never from the command line itself, where every process of the machine could read it."""
    if arguments.api_key_file is not None:
        return Path(arguments.api_key_file).read_text(encoding="utf-8").strip()
    return os.environ.get(API_KEY_VARIABLE) or None


_TLS_OPTIONS = ("--tls-ca", "--tls-certificate", "--tls-key", "--tls-server-name")


class SecurityOptions(TypedDict):
    """As whom a client calls, and over what. Of every client of ours."""

    api_key: str | None
    tls: Tls | None
    allow_plaintext_api_key: bool


def security_of(arguments: argparse.Namespace) -> SecurityOptions:
    """What the command line says, and what the environment says besides. Raises ``ValueError``, or ``OSError``."""
    for option in _TLS_OPTIONS:
        # As of a script whose variable is not set: taken for none, it would send the prompt in clear.
        if getattr(arguments, option.removeprefix("--").replace("-", "_")) == "":
            raise UsageError(f"{option} is empty; give it a value, or leave it out")
    said = {
        CA_VARIABLE: arguments.tls_ca,
        CERTIFICATE_VARIABLE: arguments.tls_certificate,
        KEY_VARIABLE: arguments.tls_key,
        SERVER_NAME_VARIABLE: arguments.tls_server_name,
        TLS_VARIABLE: "1" if arguments.tls else None,
    }
    given = {name: value for name, value in said.items() if value is not None}
    return SecurityOptions(
        api_key=api_key_of(arguments),
        tls=None if arguments.tls is False else Tls.from_environment({**os.environ, **given}),
        allow_plaintext_api_key=arguments.allow_plaintext_api_key,
    )


def client_of(arguments: argparse.Namespace) -> BatonClient:
    """Must be called inside the event loop that uses it."""
    addresses = addresses_of(arguments)
    if not addresses:
        raise UsageError("--address is empty; give host:port")
    return BatonClient(addresses, **security_of(arguments))


def timeout_of(arguments: argparse.Namespace) -> float:
    timeout_s: float = arguments.timeout
    if not (timeout_s > 0 and math.isfinite(timeout_s)):
        raise UsageError(f"timeout must be positive seconds, not {timeout_s:g}")
    return timeout_s


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    return Sampling(
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
        seed=arguments.seed,
        presence_penalty=arguments.presence_penalty,
        frequency_penalty=arguments.frequency_penalty,
        repetition_penalty=arguments.repetition_penalty,
        logit_bias=tuple(arguments.logit_bias),
        allowed_token_ids=tuple(arguments.allowed_token_ids),
        bad_token_sequences=tuple(arguments.bad_token_ids),
        structure=_structure_of(arguments),
    )


def stop_of(arguments: argparse.Namespace) -> StopConditions:
    return StopConditions(
        max_output_token_count=arguments.max_tokens,
        stop_sequences=tuple(arguments.stop),
        stop_token_ids=tuple(arguments.stop_token_id),
        ignore_eos=arguments.ignore_eos,
        min_output_token_count=arguments.min_tokens,
    )


def options_of(
    arguments: argparse.Namespace, *, output: OutputOptions | None = None, sample_count: int = 1
) -> GenerateOptions:
    """All but prompt and timeout. Raises ``UsageError``, or ``OSError`` for a file that cannot be read."""
    return GenerateOptions(
        model=arguments.model,
        sampling=sampling_of(arguments),
        stop=stop_of(arguments),
        output=output,
        priority=arguments.priority,
        session_id=arguments.session_id,
        correlation_id=arguments.correlation_id,
        tenant=arguments.tenant,
        sample_count=sample_count,
        resume=arguments.resume,
    )


def conversation_of(arguments: argparse.Namespace, messages: Sequence[ChatMessage]) -> ChatPrompt:
    """Raises ``UsageError``, or ``OSError`` for a file that cannot be read."""
    tools: list[Any] = []
    if arguments.tools is not None:
        try:
            tools = json.loads(Path(arguments.tools).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"{arguments.tools} is no JSON: {error}") from None
        if not isinstance(tools, list):
            raise UsageError(f"{arguments.tools} must be a JSON list of tools")
    choice = arguments.tool_choice or ToolChoice.AUTO.value
    is_name = choice not in [each.value for each in ToolChoice]
    try:
        return chat_prompt(
            messages,
            tools=tools,
            tool_choice=ToolChoice.REQUIRED if is_name else choice,
            tool_name=choice if is_name else "",
            template_arguments=dict(arguments.template_argument),
            keep_reasoning_in_text=arguments.keep_reasoning,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None


def prompt_of(arguments: argparse.Namespace, text: str) -> Prompt:
    """The prompt of ``generate``. Raises as ``conversation_of``."""
    if arguments.token_ids:
        try:
            return TokenPrompt(_ids(text))
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"with --token-ids the prompt is token ids: {error}") from None
    if arguments.raw:
        return TextPrompt(text)
    system = [ChatMessage("system", arguments.system)] if arguments.system is not None else []
    return conversation_of(arguments, [*system, ChatMessage("user", text)])


def _structure_of(arguments: argparse.Namespace) -> Structure | None:
    if arguments.json_schema is not None:
        return Structure(StructureKind.JSON_SCHEMA, Path(arguments.json_schema).read_text(encoding="utf-8"))
    if arguments.json_object:
        return Structure(StructureKind.JSON_OBJECT)
    if arguments.regex is not None:
        return Structure(StructureKind.REGEX, arguments.regex)
    if arguments.choice:
        return Structure(StructureKind.CHOICE, choices=tuple(arguments.choice))
    if arguments.grammar is not None:
        return Structure(StructureKind.GRAMMAR, Path(arguments.grammar).read_text(encoding="utf-8"))
    return None


def _ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(each) for each in text.replace(",", " ").split())
    except ValueError:
        raise argparse.ArgumentTypeError("write whole numbers, as 5,17,42") from None


def _bias(text: str) -> tuple[int, float]:
    token_id, is_there, bias = text.partition("=")
    try:
        if not is_there:
            raise ValueError
        return int(token_id), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError("write ID=BIAS, as 42=-1.5") from None


def _template_argument(text: str) -> tuple[str, TemplateArgument]:
    name, is_there, value = text.partition("=")
    if not name or not is_there:
        raise argparse.ArgumentTypeError("write NAME=VALUE, as enable_thinking=false")
    try:
        read = json.loads(value)
    except ValueError:
        return name, value  # a word needs no quotes
    if not isinstance(read, str | int | float | bool):
        raise argparse.ArgumentTypeError("a value is text, a number, true or false")
    return name, read
