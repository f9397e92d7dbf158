"""What the sections of a soak share: where the model is, the seed, and how progress is told."""

from __future__ import annotations

import os
from pathlib import Path

SEED = 20261121


def model_directory() -> Path:
    """The prepared default model."""
    home = Path(os.environ.get("BATON_HOME", "~/.cache/baton")).expanduser()
    return home / "models" / "smollm2-135m-instruct"


def say(text: str) -> None:
    print(text, flush=True)
