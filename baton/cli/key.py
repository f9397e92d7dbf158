"""``baton key``: makes an API key and shows it once. The server's file of keys has its digest only."""

from __future__ import annotations

import argparse
import hashlib
import re
import secrets
import sys
from typing import Any

from baton.cli import exits
from baton.cli.json_lines import json_line

KEY_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TENANT = re.compile(r"[A-Za-z0-9_.-]{0,64}")


def add_command(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "key",
        help="make an API key for a caller",
        description="Prints a new key on standard error, once, and on standard output the table for the file that "
        "router.api_keys_path names. The table has the key's SHA-256, not the key.",
    )
    parser.add_argument("name", help="whose key it is: letters, digits and _ -, 1 to 64")
    parser.add_argument("--tenant", default="", help="whose prompts share a cache; default: the common one")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    for what, value, pattern in (("name", arguments.name, _NAME), ("--tenant", arguments.tenant, _TENANT)):
        if not pattern.fullmatch(value):
            return exits.usage(ValueError(f"{what}: {value!r} must match {pattern.pattern}"))
    key = f"bk-{secrets.token_urlsafe(KEY_BYTES)}"
    digest = hashlib.sha256(key.encode()).hexdigest()
    if arguments.json:
        print(
            json_line(
                {"event": "key", "name": arguments.name, "key": key, "sha256": digest, "tenant": arguments.tenant}
            )
        )
        return exits.OK
    print(f"The key, which is shown only now: {key}", file=sys.stderr)
    print(f'[{arguments.name}]\nsha256 = "{digest}"\ntenant = "{arguments.tenant}"')
    return exits.OK
