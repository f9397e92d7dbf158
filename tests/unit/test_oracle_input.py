"""What the oracle refuses before it starts an engine, and what it reads back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.oracle import OracleInputError, OraclePrompt, parse_prompts, read_answers, write_prompts

VALID: dict[str, Any] = {"id": "p", "prompt_token_ids": [1, 2], "max_tokens": 3}


def parse(*entries: object) -> list[OraclePrompt]:
    return parse_prompts({"prompts": list(entries)}, vocab_size=10, max_model_len=8)


def test_a_prompts_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    prompts = [OraclePrompt("a", (1, 2, 3), 4, ignore_eos=True), OraclePrompt("b", (9,), 1, stop_token_ids=(0,))]
    write_prompts(tmp_path / "p.json", prompts)
    document = json.loads((tmp_path / "p.json").read_text())
    assert parse_prompts(document, vocab_size=10, max_model_len=8) == prompts


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompt_token_ids": []}, "prompts[0].prompt_token_ids"),
        ({"prompt_token_ids": [1, 10]}, "prompts[0].prompt_token_ids[1]"),
        ({"prompt_token_ids": [-1]}, "prompts[0].prompt_token_ids[0]"),
        ({"prompt_token_ids": [True]}, "prompts[0].prompt_token_ids[0]"),
        ({"prompt_token_ids": "1 2"}, "prompts[0].prompt_token_ids"),
        ({"max_tokens": 0}, "prompts[0].max_tokens"),
        ({"max_tokens": 7}, "--max-model-len 8"),
        ({"ignore_eos": 1}, "prompts[0].ignore_eos"),
        ({"stop_token_ids": [10]}, "prompts[0].stop_token_ids[0]"),
        ({"id": 3}, "prompts[0].id"),
        ({"max_token": 3}, "prompts[0].max_token "),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(OracleInputError) as refused:
        parse({**VALID, **change})
    assert field in str(refused.value)


def test_an_id_given_twice_is_refused() -> None:
    with pytest.raises(OracleInputError, match=r"prompts\[1\]\.id 'p' appears twice"):
        parse(VALID, VALID)


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(OracleInputError, match="prompts is empty"):
        parse()


def test_a_model_without_config_is_refused_in_words_and_without_starting_an_engine(tmp_path: Path) -> None:
    write_prompts(tmp_path / "p.json", [OraclePrompt("a", (1,), 1)])
    command = [sys.executable, "-m", "bench.oracle", "--model", str(tmp_path), "--prompts", str(tmp_path / "p.json")]
    ended = subprocess.run([*command, "--out", str(tmp_path / "o.json")], capture_output=True, text=True, timeout=30)
    assert ended.returncode == 2
    assert "cannot be read as a model config" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "o.json").exists()


def test_answers_are_read_in_the_words_of_the_exactness_judge(tmp_path: Path) -> None:
    entry = {"id": "a", "token_ids": [5, 6], "rivals": [[[7, 0.5]], [[8, 0.0], [9, 0.25]]]}
    (tmp_path / "o.json").write_text(json.dumps({"oracle": {}, "answers": [entry]}))
    answer = read_answers(tmp_path / "o.json")["a"]
    assert (answer.token_ids, answer.rivals) == ((5, 6), (((7, 0.5),), ((8, 0.0), (9, 0.25))))
