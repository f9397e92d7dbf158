"""The page of the chat example in a headless browser: its bridge is a process, its Baton says what it is told."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from chromium import Chromium

from baton.testing import FakeBaton
from deploy.setup import prepare_browser
from deploy.setup.prepare_model import baton_home

BRIDGE = Path(__file__).resolve().parents[2] / "examples" / "chat_ui" / "bridge.py"
ASK = """(text => {
    document.getElementById("text").value = text;
    document.getElementById("form").requestSubmit();
    return true;
})"""
SHOWN = """[...document.querySelectorAll("#conversation > div")].map(box => [box.className, box.textContent])"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    folder = prepare_browser.folder_of(baton_home())
    fault = prepare_browser.fault_of(folder)
    if fault is not None:
        pytest.fail(f"the browser is not ready at {folder}: {fault}. Run `make browser` (70 MB, ten seconds)")
    home = tmp_path_factory.mktemp("browser")
    with Chromium(folder / prepare_browser.PROGRAM, prepare_browser.environment_of(folder), home) as one:
        yield one


@contextmanager
def bridge(baton: str) -> Iterator[str]:
    """The address of its page."""
    process = subprocess.Popen(
        [sys.executable, str(BRIDGE), "--baton", baton, "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found, "the bridge did not say where it listens"
        yield found[0]
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_until(browser: Chromium, condition: str) -> None:
    deadline = time.monotonic() + 60
    while browser.evaluate(condition) is not True:
        assert time.monotonic() < deadline, f"never came true: {condition}; errors: {browser.console_errors()}"
        time.sleep(0.02)  # a poll of another process


IDLE = 'document.getElementById("stop").disabled && !document.getElementById("send").disabled'


def test_a_conversation_streams_into_the_page_is_stopped_and_goes_on(browser: Chromium) -> None:
    with FakeBaton() as fake, bridge(fake.address) as page:
        fake.will_answer("Hello ", "<b>you</b>", "!")
        fake.will_answer(*(f"word {number} " for number in range(500)), chunk_delay_s=0.05)
        fake.will_answer("and on")
        browser.open(page)
        browser.evaluate(f"{ASK}('hi')")
        wait_until(browser, f"{IDLE} && document.querySelectorAll('.note').length === 1")
        shown = browser.evaluate(SHOWN)
        assert shown[:2] == [["message user", "hi"], ["message", "Hello <b>you</b>!"]], "text is text, never HTML"
        assert re.match(r"\d+ tokens, first after \d+ ms, then ", shown[2][1])

        browser.evaluate(f"{ASK}('tell me a lot')")
        wait_until(browser, 'document.querySelectorAll(".message")[3]?.textContent.includes("word 1 ") ?? false')
        browser.evaluate('(document.getElementById("stop").click(), true)')
        wait_until(browser, IDLE)
        assert browser.evaluate(SHOWN)[-1] == ["note", "stopped"]

        browser.evaluate(f"{ASK}('go on')")
        wait_until(browser, f"{IDLE} && document.querySelectorAll('.note').length === 3")
        assert browser.evaluate(SHOWN)[-2] == ["message", "and on"]
        said = [(message.role, message.content) for message in fake.requests[-1].prompt.messages]  # type: ignore[union-attr]
        assert [role for role, _ in said] == ["user", "assistant", "user", "assistant", "user"]
        assert said[1][1] == "Hello <b>you</b>!"
        assert said[3][1].startswith("word 0 word 1 ")
        assert browser.console_errors() == []


def test_a_refusal_is_shown_and_the_question_can_be_asked_again(browser: Chromium) -> None:
    with FakeBaton() as fake, bridge(fake.address) as page:
        fake.will_refuse()
        fake.will_answer("now")
        browser.open(page)
        browser.evaluate(f"{ASK}('hi')")
        wait_until(browser, f"{IDLE} && document.querySelectorAll('.note').length === 1")
        assert browser.evaluate(SHOWN)[-1][1].startswith("QUEUE_FULL: ")
        browser.evaluate(f"{ASK}('hi')")
        wait_until(browser, f"{IDLE} && document.querySelectorAll('.note').length === 2")
        assert browser.evaluate(SHOWN)[-2] == ["message", "now"]
        assert len(fake.requests[-1].prompt.messages) == 1  # type: ignore[union-attr]
