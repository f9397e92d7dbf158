"""What a client of Baton in another language sets, written from our own client's constants.

    python -m deploy.setup.client_settings      writes deploy/service_config.json and deploy/channel_options.json

``service_config.json`` is a gRPC service config as every language takes it: retries of what was refused before it
was admitted. ``channel_options.json`` has the rest by gRPC's own names: keepalive that lives through a long prefill
and is no oftener than a router permits, and how fast to connect again.
"""

from __future__ import annotations

import json
from pathlib import Path

from baton.channels import CHANNEL_OPTIONS, SERVICE_CONFIG

FOLDER = Path(__file__).resolve().parent.parent


def settings() -> dict[str, str]:
    """Texts by file name."""
    options = {name: value for name, value in CHANNEL_OPTIONS if name != "grpc.service_config"}
    return {
        "service_config.json": json.dumps(SERVICE_CONFIG, indent=2) + "\n",
        "channel_options.json": json.dumps(options, indent=2) + "\n",
    }


def main() -> None:
    for name, text in settings().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
