"""The arrows of ARCHITECTURE.md, enforced on the syntax trees of every file we ship.

``violations`` reads source text, so that the test can feed it a bad file for every rule and see it caught.
"""

from __future__ import annotations

import ast
import fnmatch
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("baton", "kvtransfer", "engine", "prefill_worker", "decode_worker", "router", "fleet")
UNBOUND = ("bench", "tests")
"""May import anything; nothing imports them."""

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "baton": (),
    "kvtransfer": ("baton",),
    "engine": ("baton", "kvtransfer"),
    "prefill_worker": ("baton", "kvtransfer", "engine"),
    "decode_worker": ("baton", "kvtransfer", "engine"),
    "router": ("baton", "kvtransfer.ticket"),
    "fleet": ("baton", "kvtransfer", "engine", "router.config", "prefill_worker.config", "decode_worker.config"),
}
"""Besides itself. A name allows itself and what is below it."""

MAY_IMPORT_LATE: dict[str, tuple[str, ...]] = {
    "fleet/*.py": ("prefill_worker", "decode_worker", "router"),
    "baton/__main__.py": ("fleet", "router"),
    "baton/cli*.py": ("fleet", "router"),
}
"""Besides those, inside a function: whoever starts processes and commands composes the rooms."""

BY_NAME = {"baton/__main__.py": ("bench.cli",)}
"""The one arrow into the workbench, inside a function: its verbs, where the server is installed."""

PROCESS_MAINS: dict[str, tuple[str, ...]] = {
    "fleet.worker_process": ("prefill_worker", "decode_worker"),
    "fleet.router_process": ("router",),
}
"""What a child process runs: it composes at the top, and is itself imported only inside functions."""

HEAVY: dict[str, tuple[str, ...]] = {
    "ray": ("fleet/*.py",),
    "vllm": (
        "engine/vllm_engine.py",
        "engine/vllm_arguments.py",
        "engine/vllm_sampling.py",
        "kvtransfer/connector*.py",
        "router/chats/parser_process.py",  # a child of the router: its parsers, and nothing of its engine
    ),
    "nixl": ("engine/vllm_engine.py", "kvtransfer/connector*.py"),
    "torch": (
        "engine/vllm_engine.py",
        "kvtransfer/connector*.py",
        "kvtransfer/digest.py",
        "deploy/setup/prepare_model.py",
    ),
    "transformers": ("deploy/setup/prepare_model.py",),
}
"""Packages that only the named files may import."""

WIRE_MODULES = ("baton.v1", "baton.worker.v1", "baton.admin.v1", "google.protobuf", "google.rpc")
WIRE_FILES = (
    *("service.py", "service_*.py", "*_service.py", "client.py", "*_client.py", "status.py", "*_proto.py"),
    "server.py",  # attaches services to sockets
)
"""Where protobuf messages become our dataclasses and back. Everywhere else they are unknown."""

WALL_CLOCK = (
    *("time.time", "time.monotonic", "time.perf_counter", "time.sleep", "datetime.now", "datetime.datetime.now"),
    *("random.random", "random.choice", "random.randint", "random.uniform", "random.shuffle", "random.sample"),
)
OWN_CLOCK = ("kvtransfer/connector*.py", "engine/vllm_engine.py", "router/wall_clock.py")
"""Run inside vLLM's own process or against its own timestamps, where there is no loop of ours; and the one place that
reads the time of day, for what outlives its process."""

UNSAFE_MODULES = ("pickle", "cloudpickle", "dill", "marshal", "shelve", "jsonpickle")
UNSAFE_CALLS = ("torch.load", "yaml.load", "os.system", "os.popen", "eval", "exec")
JUNK_NAMES = ("common", "utils", "util", "helpers", "misc")
EVERYWHERE = ("0.0.0.0", "[::]", "::")


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    is_late: bool
    """Inside a function."""
    is_for_types: bool
    """Under ``if TYPE_CHECKING``: no import at run time, but an arrow all the same."""


def imports(tree: ast.AST) -> Iterator[Import]:
    def walk(node: ast.AST, is_late: bool, is_for_types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            late = is_late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            types = is_for_types or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
            match child:
                case ast.Import(names=names):
                    for name in names:
                        yield Import(name.name, child.lineno, late, types)
                case ast.ImportFrom(module=module, names=names, level=0) if module:
                    for name in names:
                        yield Import(f"{module}.{name.name}", child.lineno, late, types)
                case ast.ImportFrom():
                    yield Import("(relative)", child.lineno, late, types)
                case ast.Call(func=func, args=[ast.Constant(value=str(module)), *_]) if ast.unparse(func) in (
                    "importlib.import_module",
                    "import_module",
                    "__import__",
                ):
                    yield Import(module, child.lineno, late, types)
            yield from walk(child, late, types)

    yield from walk(tree, False, False)


def is_at(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(path, pattern) for pattern in patterns)


def is_everywhere(value: object) -> bool:
    return isinstance(value, str) and (value in EVERYWHERE or value.startswith(("0.0.0.0:", "[::]:")))


def violations(path: str, source: str) -> list[str]:
    """Every broken rule of one file; ``path`` is relative to the root."""
    found: list[str] = []
    tree = ast.parse(source)
    room = path.split("/")[0]
    name = path.rsplit("/", 1)[-1]
    main_names = PROCESS_MAINS.get(path.removesuffix(".py").replace("/", "."), ())
    late_names = tuple(n for pattern, names in MAY_IMPORT_LATE.items() if matches(path, (pattern,)) for n in names)
    for one in imports(tree):
        where = f"{path}:{one.line}: "
        top = one.module.split(".")[0]
        if room in ROOMS:
            if one.module == "(relative)":
                found.append(where + "imports are absolute, so that the arrows can be read")
            if top in UNBOUND and not (one.is_late and is_at(one.module, BY_NAME.get(path, ()))):
                found.append(where + f"nothing imports {top}")
            elif top in ROOMS and top != room and not is_at(one.module, MAY_IMPORT[room]):
                if not is_at(one.module, (*main_names, *late_names)):
                    found.append(where + f"{room} may not import {one.module}")
                elif not is_at(one.module, main_names) and not one.is_late:
                    found.append(where + f"{room} may import {one.module} only inside a function")
            if is_at(one.module, tuple(PROCESS_MAINS)) and not one.is_late:
                found.append(where + f"{one.module} is a process's main: import it inside a function")
            if is_at(one.module, WIRE_MODULES) and not matches(name, WIRE_FILES):
                found.append(where + f"protobuf stays in {', '.join(WIRE_FILES)}: not {one.module}")
        if room not in UNBOUND:
            if top in HEAVY and not matches(path, HEAVY[top]):
                found.append(where + f"{top} is imported only in {', '.join(HEAVY[top])}")
            if top in UNSAFE_MODULES:
                found.append(where + f"{top} runs what it reads")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in UNSAFE_CALLS:
                found.append(f"{path}:{node.lineno}: {ast.unparse(node.func)} runs what it is given")
            for keyword in node.keywords:
                if keyword.arg == "shell" and ast.unparse(keyword.value) != "False":
                    found.append(f"{path}:{node.lineno}: no shell=True")
            if room in ROOMS and not matches(path, OWN_CLOCK) and ast.unparse(node.func) in WALL_CLOCK:
                found.append(f"{path}:{node.lineno}: time is the loop's, randomness an argument")
        if isinstance(node, ast.Constant) and room != "tests" and is_everywhere(node.value):
            found.append(f"{path}:{node.lineno}: nothing listens on every address unless a person's config says so")
    return found


def junk_names(paths: list[str]) -> list[str]:
    """Paths with a folder or module that names no thing of the domain."""
    return [path for path in paths if any(part.removesuffix(".py") in JUNK_NAMES for part in path.split("/"))]


def shipped() -> list[Path]:
    found = [path for room in (*ROOMS, "bench", "deploy") for path in (ROOT / room).rglob("*.py")]
    return sorted(path for path in found if not path.name.endswith(("_pb2.py", "_pb2_grpc.py")))


@pytest.mark.parametrize("path", shipped(), ids=lambda path: str(path.relative_to(ROOT)))
def test_file_respects_the_arrows(path: Path) -> None:
    assert violations(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) == []


BAD_FILES = {
    "baton imports nothing of ours": ("baton/request.py", "from router.relay import Relay"),
    "the core imports no engine": ("kvtransfer/ledger.py", "import engine.protocol"),
    "engine imports no worker": (
        "engine/hosting.py",
        "def f():\n    from prefill_worker.worker import PrefillWorker",
    ),
    "workers do not know each other": ("prefill_worker/worker.py", "from decode_worker import worker"),
    "the router knows tickets only": ("router/relay.py", "from kvtransfer.ledger import Ledger"),
    "the router knows no engine, even for types": (
        "router/relay.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from engine.protocol import Engine",
    ),
    "the fleet composes late": ("fleet/local_fleet.py", "from prefill_worker.worker import PrefillWorker"),
    "a process's main is imported late": ("fleet/local_fleet.py", "from fleet.worker_process import run_worker"),
    "commands compose late": ("baton/cli.py", "import fleet.supervisor"),
    "nothing imports bench": ("fleet/config.py", "import bench.soak"),
    "nothing but the command imports the workbench": ("baton/cli.py", "def f():\n    import bench.cli"),
    "the command loads the workbench late": ("baton/__main__.py", "import bench.cli"),
    "nothing imports tests": ("router/relay.py", "from tests.conftest import x"),
    "no hidden arrow": ("router/relay.py", "import importlib\nimportlib.import_module('engine.protocol')"),
    "no relative import": ("router/relay.py", "from . import handoff"),
    "protobuf in the core": ("router/relay.py", "from baton.worker.v1 import worker_pb2"),
    "protobuf runtime in the core": ("router/handoff.py", "from google.protobuf import duration_pb2"),
    "ray outside the fleet": ("router/roster.py", "def f():\n    import ray"),
    "vllm outside its files": ("engine/sim.py", "from vllm import AsyncLLM"),
    "torch in the router": ("router/tokenizer.py", "import torch.nn"),
    "the wall clock": ("router/relay.py", "import time\ndeadline = time.monotonic() + 5"),
    "hidden randomness": ("router/placement.py", "import random\nrandom.choice([1, 2])"),
    "pickle": ("kvtransfer/ticket.py", "import pickle"),
    "torch.load": ("kvtransfer/connector.py", "import torch\ntorch.load('x')"),
    "yaml.load": ("fleet/config.py", "import yaml\nyaml.load('x')"),
    "a shell": ("deploy/setup/console.py", "import subprocess\nsubprocess.run('ls', shell=True)"),
    "listening everywhere": ("router/config.py", "host: str = '0.0.0.0'"),
    "listening everywhere on IPv6": ("router/config.py", "address = '[::]:50051'"),
}


@pytest.mark.parametrize(("path", "source"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_caught(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


GOOD_FILES = {
    "the fleet composes late": (
        "fleet/local_fleet.py",
        "def f():\n    from fleet.worker_process import run_worker\n    import prefill_worker.worker",
    ),
    "a process's main composes": ("fleet/worker_process.py", "from decode_worker.worker import DecodeWorker"),
    "the client speaks protobuf": ("baton/client.py", "from baton.v1 import generation_pb2"),
    "the router opens tickets": ("router/relay.py", "from kvtransfer.ticket import open_ticket"),
    "names that only begin alike": ("router/relay.py", "import rayon, batonic, vllm_like"),
    "the command loads the workbench's verbs": (
        "baton/__main__.py",
        "import importlib\ndef f():\n    importlib.import_module('bench.cli')",
    ),
    "bench imports anything": ("bench/soak.py", "import vllm, ray, router.relay"),
}


@pytest.mark.parametrize(("path", "source"), GOOD_FILES.values(), ids=GOOD_FILES.keys())
def test_a_good_file_is_not_caught(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_no_folder_or_module_is_a_junk_drawer() -> None:
    assert junk_names(["router/utils.py", "engine/common/x.py", "router/relay.py"]) == [
        "router/utils.py",
        "engine/common/x.py",
    ]
    assert junk_names([str(path.relative_to(ROOT)) for path in shipped()]) == []


def test_proto_is_not_a_package() -> None:
    """Google's proto-plus owns the import name ``proto``; an ``__init__.py`` there would hide it."""
    assert list((ROOT / "proto").rglob("__init__.py")) == []


def test_every_room_is_in_the_wheel_and_under_these_rules() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packaged = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packaged == {*ROOMS, "bench"}
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders == packaged
