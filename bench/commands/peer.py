"""``baton bench peer``: one of the systems that a comparison starts, by hand, in the foreground, until Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.peers import RunningSystem

ROOT = Path(__file__).resolve().parents[2]
WATCH_INTERVAL_S = 1.0


def add_command(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "peer",
        help="start a system to compare Baton with",
        description="Starts one system on the cores that Baton would have, with the same model and limits, and "
        "stops it at Ctrl-C. Peers that are not vLLM are installed on first use, each in an environment of its own.",
    )
    parser.add_argument("name", nargs="?", help="which; --list names them")
    parser.add_argument("--list", action="store_true", help="what there is, and whether it is installed")
    parser.add_argument("--install", action="store_true", help="only prepare its environment (without a name: all)")
    parser.add_argument("--config", type=Path, default=Path("deploy/baton.toml"), help="default: %(default)s")
    parser.add_argument("--port", type=int, help="where it listens; any free port by default. Not for Baton")
    parser.add_argument("--logs", type=Path, default=Path(".baton/bench"), help="its logs (default: %(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if not (ROOT / "deploy" / "locks").is_dir():
        return _refuse("peers are started from a checkout of Baton: what they are installed from is in no wheel", 1)
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))  # for deploy.setup, which is in no package, either

    from bench.children import ChildError
    from bench.comparison.specs import SYSTEMS
    from deploy.setup.console import StepFailed
    from fleet.config import ConfigError

    if arguments.name is not None and arguments.name not in SYSTEMS:
        return _refuse(f"there is no peer {arguments.name!r}; there are: {', '.join(SYSTEMS)}")
    try:
        if arguments.list:
            return _list()
        if arguments.install:
            return _install(arguments.name)
        if arguments.name is None:
            return _refuse("name a peer; --list names them")
        return _serve(arguments)
    except StepFailed as error:
        return _refuse(f"{error.what}\n  what to do: {error.remedy}", 1)
    except (ChildError, ConfigError, ValueError) as error:
        return _refuse(str(error), 1)


def _list() -> int:
    from bench.comparison.environments import is_prepared
    from bench.comparison.specs import SYSTEMS

    width = max(map(len, SYSTEMS))
    for spec in SYSTEMS.values():
        missing = [name for name in spec.environments if not is_prepared(name)]
        note = f"  (not installed: {', '.join(missing)})" if missing else ""
        print(f"{spec.name:{width}}  {spec.title}{note}")
    return 0


def _install(name: str | None) -> int:
    from bench.comparison.environments import prepared
    from bench.comparison.specs import SYSTEMS

    specs = SYSTEMS.values() if name is None else [SYSTEMS[name]]
    wanted = list(dict.fromkeys(environment for spec in specs for environment in spec.environments))
    for environment in wanted:
        print(f"{environment}: {prepared(environment).path}")
    if not wanted:
        print(f"{name} runs from Baton's own environment")
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    from bench.comparison.specs import SYSTEMS
    from bench.peers import start_system
    from fleet.config import check_model_directory, load_config

    config = load_config(arguments.config)
    check_model_directory(config)
    spec = SYSTEMS[arguments.name]
    ended = threading.Event()

    def end(number: int, _: FrameType | None) -> None:
        if ended.is_set():
            return  # it is being stopped
        ended.set()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    print(f"starting {spec.title}; logs in {arguments.logs}", flush=True)
    system: RunningSystem | None = None
    try:
        system = start_system(spec, config, arguments.config, arguments.logs, port=arguments.port)
        target = f"baton://{system.target_address}" if system.target_kind == "baton" else system.target_address
        print(f"ready after {system.facts['start_s']:.0f} s: {target}")
        print(f"  load it:  baton bench run --target {target} --label {spec.name}")
        print("  stop it:  Ctrl-C", flush=True)
        while not ended.wait(WATCH_INTERVAL_S):
            system.assert_running()
    except KeyboardInterrupt:
        pass
    finally:
        ended.set()
        if system is not None:
            print("stopping", flush=True)
            system.stop()
    return 0


def _refuse(text: str, status: int = 2) -> int:
    print(f"baton bench peer: {text}", file=sys.stderr)
    return status
