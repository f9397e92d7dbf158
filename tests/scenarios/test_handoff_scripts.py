"""The handoff's decisions, script by script: tests/scenarios/testdata/*.txt.

``pytest tests/scenarios/test_handoff_scripts.py --rewrite`` writes what happens into the scripts. Inspect the diff;
commit it only if you understand what caused it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from handoff_script import Script

TESTDATA = Path(__file__).parent / "testdata"
SCRIPTS = sorted(TESTDATA.glob("*.txt"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script(path: Path, request: pytest.FixtureRequest) -> None:
    written = path.read_text(encoding="utf-8")
    happened = replay(written)
    if request.config.getoption("--rewrite"):
        path.write_text(happened, encoding="utf-8")
    else:
        assert happened == written


def test_there_are_scripts_and_every_one_of_them_ends() -> None:
    assert len(SCRIPTS) >= 10
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        endings = sum(line.startswith(("FINISH", "FAIL", "ABANDON")) for line in text.splitlines())
        assert endings == sum(line.startswith("request") for line in text.splitlines()), path


def replay(text: str) -> str:
    """The script with its outcomes as they are now."""
    script = Script()
    blocks = []
    for block in text.strip().split("\n\n"):
        lines = block.splitlines()
        comments = [line for line in lines if line.startswith("#")]
        commands = [line for line in lines if not line.startswith("#")]
        if commands:
            command = commands[0]
            blocks.append("\n".join([*comments, command, "----", *script.run(command)]))
        else:
            blocks.append("\n".join(comments))
    return "\n\n".join(blocks) + "\n"
