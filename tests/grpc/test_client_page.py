"""Every example of docs/api/client.md and of the wheel's README runs, against a fake."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from baton.testing import FakeBaton

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "docs" / "api" / "client.md", ROOT / "deploy" / "client" / "README.md")
EXAMPLES = [
    pytest.param(example, id=f"{page.name}-{number}")
    for page in PAGES
    for number, example in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S))
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_example_runs(example: str, tmp_path: Path) -> None:
    if "def test_" in example:
        path = tmp_path / "test_example.py"
        path.write_text(example)
        options = ["-q", "-p", "baton.pytest_plugin", "-p", "no:cacheprovider", f"--rootdir={tmp_path}"]
        command = [sys.executable, "-m", "pytest", *options, str(path)]
        expected = "1 passed"
    else:
        path = tmp_path / "example.py"
        command, expected = [sys.executable, str(path)], "You said: "
    with FakeBaton() as fake:
        path.write_text(example.replace("127.0.0.1:50051", fake.address))
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, env={"PYTHONPATH": str(ROOT)}
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert expected in done.stdout
