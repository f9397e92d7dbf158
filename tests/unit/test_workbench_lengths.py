"""Distributions of token counts, and how what is too long is cut."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bench.traffic.draft import fit_to_context, summary_of
from bench.traffic.lengths import Empirical, Fixed, Lengths, LogNormal, Uniform, parse_lengths


def drawn(lengths: Lengths, count: int = 20_000, scale: float = 1.0) -> list[int]:
    rng = random.Random(1)
    return [lengths.draw(rng, scale) for _ in range(count)]


def test_a_constant_is_constant_and_is_scaled_to_the_nearest_token() -> None:
    assert set(drawn(Fixed(512), 10)) == {512}
    assert set(drawn(Fixed(5), 10, scale=0.5)) == {3}  # 2.5: halves go up
    assert set(drawn(Fixed(5), 10, scale=0.001)) == {1}, "no length is ever 0"


def test_uniform_counts_are_all_as_likely_ends_included() -> None:
    counts = np.bincount(drawn(Uniform(3, 12)))
    assert counts[:3].sum() == 0
    assert len(counts) == 13
    assert stats.chisquare(counts[3:]).pvalue > 0.01


def test_lognormal_counts_have_the_named_quantiles() -> None:
    counts = np.array(drawn(LogNormal(1500, 0.96)))
    independent = stats.lognorm(0.96, scale=1500)
    assert stats.kstest(counts, independent.cdf).pvalue > 0.01  # rounding is far below what 20,000 values tell
    assert np.quantile(counts, 0.95) == pytest.approx(1500 * math.exp(1.645 * 0.96), rel=0.05)


def test_cut_offs_are_exact_and_gather_what_is_beyond() -> None:
    counts = np.array(drawn(LogNormal(100, 1.0, low=50, high=200)))
    assert (counts.min(), counts.max()) == (50, 200)
    beyond = stats.lognorm(1.0, scale=100).sf(199.5)
    assert stats.binomtest(int(np.sum(counts == 200)), len(counts), beyond).pvalue > 0.01


def test_a_scale_is_applied_after_the_cut_offs() -> None:
    assert max(drawn(LogNormal(100, 1.0, high=200), scale=0.25)) == 50


def test_empirical_counts_are_those_of_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("at_s,prompt_token_count,output_token_count\n0,10,7\n1,20,0\n2,20,9\n3,40,9\n", encoding="utf-8")
    prompts = parse_lengths(f"empirical:{path},of=prompt")
    counts = np.bincount(drawn(prompts))
    assert stats.chisquare([counts[10], counts[20], counts[40]], [5000, 10_000, 5000]).pvalue > 0.01
    outputs = parse_lengths(f"empirical:{path},of=output")
    assert set(drawn(outputs, 1000)) == {7, 9}, "rows without an answer have no length of one"
    facts = json.dumps(outputs.facts())
    assert '"trace": "trace.csv"' in facts
    assert "trace_sha256" in facts
    assert str(tmp_path) not in facts


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("512", Fixed(512)),
        ("constant:512", Fixed(512)),
        ("uniform:1..100", Uniform(1, 100)),
        ("lognormal:200,sigma=1", LogNormal(200, 1.0)),
        ("lognormal:200.5,sigma=0.5,min=10,max=2000", LogNormal(200.5, 0.5, 10, 2000)),
    ],
)
def test_spellings_are_read_and_facts_spell_them_again(text: str, lengths: Lengths) -> None:
    assert parse_lengths(text) == lengths
    assert parse_lengths(str(lengths.facts()["spelling"])) == lengths


@given(st.floats(1, 1e6), st.floats(0, 10))
def test_a_spelling_loses_no_digit(median: float, sigma: float) -> None:
    lengths = LogNormal(median, sigma)
    assert parse_lengths(str(lengths.facts()["spelling"])) == lengths


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("many", "no distribution of lengths"),
        ("-3", "no distribution of lengths"),
        ("zipf:3", "no distribution of lengths"),
        ("lognormal:", "no distribution of lengths"),
        ("0", "from 0 to 0 are not within"),
        ("constant:0", "from 0 to 0 are not within"),
        ("constant:1.5", "'1.5' is not a whole number"),
        ("uniform:5", "two counts are needed"),
        ("uniform:5..2", "from 5 to 2 are not within"),
        ("lognormal:5", "sigma are needed"),
        ("lognormal:5,sigma=x", "'x' is not a number"),
        ("lognormal:5,sigma=nan", "sigma nan"),
        ("lognormal:5,sigma=-1", "sigma -1"),
        ("lognormal:5,sigma=1,max=4", "median 5 is not within 1 and 4"),
        ("lognormal:5,width=1", "'width' is not one of its parameters"),
        ("empirical:no_such_file", "of=prompt or of=output"),
        ("empirical:no_such_file,of=output", "no such file"),
    ],
)
def test_a_spelling_that_cannot_be_read_says_why(text: str, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_lengths(text)
    assert says in str(caught.value)


def test_an_empirical_distribution_needs_values() -> None:
    with pytest.raises(ValueError, match="needs values"):
        Empirical(())


@given(st.integers(1, 500), st.integers(1, 500), st.integers(2, 300))
def test_what_is_too_long_is_cut_fairly_and_exactly(prompt: int, output: int, context: int) -> None:
    kept_prompt, kept_output = fit_to_context(prompt, output, context)
    assert 1 <= kept_prompt <= prompt
    assert 1 <= kept_output <= output
    assert kept_prompt + kept_output == min(prompt + output, context), "nothing is cut that need not be"
    if kept_prompt < prompt:
        assert kept_output <= kept_prompt, "only the longer one is cut"
    if kept_output < output:
        assert kept_prompt <= kept_output + 1


def test_cutting_by_hand() -> None:
    assert fit_to_context(900, 50, 1000) == (900, 50)
    assert fit_to_context(1000, 50, 1000) == (950, 50)
    assert fit_to_context(100, 2000, 1000) == (100, 900)
    assert fit_to_context(3000, 2000, 1001) == (501, 500)


def test_the_summary_of_counts_by_hand() -> None:
    assert summary_of([5, 1, 4, 2, 3]) == {"sum": 15, "mean": 3.0, "p50": 3, "p95": 5, "max": 5}
    assert summary_of(range(1, 101)) == {"sum": 5050, "mean": 50.5, "p50": 50, "p95": 95, "max": 100}
