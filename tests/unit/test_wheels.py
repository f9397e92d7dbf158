"""Both wheels build from this tree, and the client's brings nothing but ``baton`` into a stranger's environment."""

from __future__ import annotations

import ast
import email
import importlib.util
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import baton
from deploy.setup import wheels

ALLOWED_BESIDE_CLIENT = ("grpc", "google", "typing_extensions.py")
"""grpcio and protobuf, and what they need."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = wheels.build(tmp_path_factory.mktemp("wheels"))
    return {path.name.split("-")[0]: path for path in made}


def packages(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name.split("/")[0] for name in archive.namelist() if ".dist-info/" not in name}


def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_client_wheel_has_only_the_package_baton(built: dict[str, Path]) -> None:
    assert packages(built["baton_client"]) == {"baton"}


def test_client_wheel_depends_on_grpcio_and_protobuf_alone(built: dict[str, Path]) -> None:
    required = [
        line for line in metadata(built["baton_client"]).get_all("Requires-Dist") or [] if "extra ==" not in line
    ]
    assert sorted(line.split("<")[0].split(">")[0] for line in required) == ["grpcio", "protobuf"]


def test_client_wheel_is_typed_and_brings_the_fixture_for_pytest(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["baton_client"]) as archive:
        assert "baton/py.typed" in archive.namelist()
        (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "[pytest11]\nbaton = baton.pytest_plugin" in archive.read(name).decode()


def test_serve_wheel_has_every_room_and_no_tests(built: dict[str, Path]) -> None:
    rooms = {"baton", "kvtransfer", "engine", "prefill_worker", "decode_worker", "router", "fleet", "bench"}
    assert packages(built["baton_serve"]) == rooms


def test_serve_wheel_has_the_command(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["baton_serve"]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "baton = baton.__main__:main" in archive.read(name).decode()


def test_both_wheels_carry_the_one_version(built: dict[str, Path]) -> None:
    assert {metadata(path)["Version"] for path in built.values()} == {baton.__version__}
    for name in ("pyproject.toml", "deploy/client/pyproject.toml"):
        assert baton.__version__ not in (wheels.ROOT / name).read_text(encoding="utf-8")


def test_client_imports_with_nothing_but_grpcio_and_protobuf(built: dict[str, Path], tmp_path: Path) -> None:
    """In an interpreter that sees the unpacked wheel, those two, and the standard library."""
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*install, str(built["baton_client"])], check=True, capture_output=True)
    grpc = importlib.util.find_spec("grpc")
    assert grpc is not None
    assert grpc.origin is not None
    site = Path(grpc.origin).parents[1]
    beside = tmp_path / "beside"
    beside.mkdir()
    for name in ALLOWED_BESIDE_CLIENT:
        (beside / name).symlink_to(site / name)
    program = f"""
import sys
import tomllib
sys.path[:] = [p for p in sys.path if "site-packages" not in p] + [{str(target)!r}, {str(beside)!r}]
import baton.client
assert baton.client.__file__.startswith({str(target)!r}), baton.client.__file__
assert hasattr(baton.client, "BatonClient")
import importlib.util
for name in ("router", "engine", "fleet", "ray", "vllm", "torch", "prometheus_client"):
    assert importlib.util.find_spec(name) is None, name
from baton.__main__ import main
assert main(["up"]) == 2  # says that it needs baton-serve
print("imported", baton.__version__)
"""
    answer = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "needs baton-serve" in answer.stderr
    assert answer.stdout.strip() == f"imported {baton.__version__}"


def test_every_eager_import_of_serve_is_a_declared_dependency() -> None:
    """What our files import at module level is in ``[project.dependencies]``, or comes with the engine extra."""
    import_name = {
        "grpcio": "grpc", "grpcio-health-checking": "grpc_health", "grpcio-reflection": "grpc_reflection",
        "protobuf": "google", "prometheus-client": "prometheus_client", "ray": "ray",
    }  # fmt: skip
    declared_names = {
        import_name.get(name, name) for name in (line.split(">")[0].split("[")[0] for line in declared_dependencies())
    }
    with_engine = {"vllm", "torch", "nixl", "xxhash", "zmq", "msgspec", "numpy", "transformers"}
    ours = {"baton", "kvtransfer", "engine", "prefill_worker", "decode_worker", "router", "fleet"}
    by_pytest = {"pytest"}  # baton/pytest_plugin.py, which nothing but pytest loads
    unknown: dict[str, str] = {}
    for room in ours:
        for path in (wheels.ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names: list[str] = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module or ""]
                for top in (name.split(".")[0] for name in names):
                    if top not in {*declared_names, *with_engine, *ours, *by_pytest, *sys.stdlib_module_names}:
                        unknown[top] = str(path.relative_to(wheels.ROOT))
    assert unknown == {}


def declared_dependencies() -> list[str]:
    project = tomllib.loads((wheels.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return list(project["dependencies"])
