"""A calibration finds again what it was given: costs, contention, overheads, the link; and its file says so."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bench.commands import calibrate
from bench.simulation import disturbance
from bench.simulation.fit import FitImpossible, fit_linear, fit_overheads, fit_steps, make_profile
from bench.simulation.observed import Answered, Observed, from_lines, to_lines
from bench.simulation.probe import Effort, effort
from bench.simulation.profile import (
    Contention,
    FitError,
    Line,
    Noise,
    Overheads,
    Profile,
    ProfileError,
    read_profile,
    write_profile,
)
from bench.simulation.steps import Part, Step, read_steps
from engine.cost import Chunk, CostModel, DecodeCost, Link, PrefillCost

COST = CostModel(PrefillCost(0.020, 1.2e-3, 4.4e-7), DecodeCost(0.030, 4.0e-6, 0.9e-3))
CONTENTION = Contention(prefill_by_decode=0.08, decode_by_prefill=0.03, decode_by_decode=0.12)
OVERHEADS = Overheads(
    admit=Line(0.003, 1e-6), first_token=Line(0.002), token=Line(0.001, 2e-4), handoff=Line(0.006, 5e-7)
)
LINK = Link(0.0008, 6e9)


def step(
    worker: str,
    began_at: float,
    parts: list[Part],
    busy: tuple[float, float],
    noise: float = 1.0,
    cost: CostModel = COST,
) -> Step:
    """As long as ``COST`` and ``CONTENTION`` say. ``busy``: shares of it with a neighbour in prefill, in decode."""
    blank = Step(worker, began_at, began_at, began_at, tuple(parts), began_at)
    is_prefill = blank.kind != "decode"
    lost = sum(
        CONTENTION.share(is_prefill=is_prefill, neighbour_is_prefill=index == 0) * share
        for index, share in enumerate(busy)
    )
    until = began_at + cost.step_s(blank.chunks, blank.context_token_counts) * noise / (1.0 - lost)
    length = until - began_at
    overlap = {"prefill": busy[0] * length, "decode": busy[1] * length}
    return dataclasses.replace(blank, ended_at=until - 1e-4, until=until, overlap_s=overlap)


def many_steps(count: int, noise: Callable[[], float], cost: CostModel = COST) -> list[Step]:
    rng = random.Random(5)
    found: list[Step] = []
    for number in range(count):
        busy = rng.choice([(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.4, 0.0)])
        if number % 4 == 0:
            busy = (0.0, busy[1])
            parts = [Part(f"p{number}.1", rng.randint(2, 512), rng.choice([0, 0, 512, 1024, 2048]), True)]
        else:
            parts = [Part(f"d{number}.{i}", 1, rng.randint(16, 3000), True) for i in range(rng.randint(1, 16))]
        found.append(step("w", float(number), parts, busy, noise(), cost))
    return found


def test_steps_without_noise_give_their_costs_back_exactly() -> None:
    fitted = fit_steps(many_steps(400, lambda: 1.0), random.Random(1), kv_bytes_per_token=23_040)
    assert dataclasses.astuple(fitted.cost.prefill) == pytest.approx(dataclasses.astuple(COST.prefill), rel=1e-4)
    assert dataclasses.astuple(fitted.cost.decode) == pytest.approx(dataclasses.astuple(COST.decode), rel=1e-4)
    assert dataclasses.astuple(fitted.contention) == pytest.approx(dataclasses.astuple(CONTENTION), abs=1e-4)
    for kind in ("prefill", "decode"):
        assert fitted.errors[kind].mape < 1e-4
        assert fitted.errors[kind].r_squared > 0.9999


def test_costs_survive_noise_and_steps_that_somebody_else_held_up() -> None:
    rng = random.Random(9)

    def noise() -> float:
        return rng.lognormvariate(0.0, 0.02) * (4.0 if rng.random() < 0.12 else 1.0)

    fitted = fit_steps(many_steps(1500, noise), random.Random(1), kv_bytes_per_token=23_040)
    batches = [[64], [512] * 4, [1500] * 16]
    for contexts in batches:
        assert fitted.cost.step_s([], contexts) == pytest.approx(COST.step_s([], contexts), rel=0.012)
    assert fitted.cost.prefill.per_token_s == pytest.approx(COST.prefill.per_token_s, rel=0.05)
    assert fitted.contention.decode_by_decode == pytest.approx(CONTENTION.decode_by_decode, abs=0.02)
    noise_of_decode = fitted.noise["decode"]
    assert noise_of_decode.at(0.5) == pytest.approx(1.0, abs=0.02)
    assert noise_of_decode.at(0.995) > 2.0, "the stalls are part of the noise"


def test_the_batch_from_which_sequences_cost_is_found_and_none_where_there_is_none() -> None:
    bent = DecodeCost(0.030, 4.0e-6, 0.3e-3, per_sequence_beyond_knee_s=1.1e-3, knee_sequence_count=8)
    rng = random.Random(9)
    steps = many_steps(500, lambda: rng.lognormvariate(0.0, 0.02), dataclasses.replace(COST, decode=bent))
    fitted = fit_steps(steps, random.Random(1), kv_bytes_per_token=1).cost.decode
    assert 7 <= fitted.knee_sequence_count <= 9
    for count in (1, 8, 16):
        assert fitted.work_s([300] * count) + fitted.base_s == pytest.approx(
            bent.work_s([300] * count) + bent.base_s, rel=0.02
        )
    straight = fit_steps(
        many_steps(500, lambda: rng.lognormvariate(0.0, 0.02)), random.Random(1), kv_bytes_per_token=1
    )
    assert straight.cost.decode.knee_sequence_count == 0


def test_no_coefficient_is_negative_where_the_data_would_have_one() -> None:
    units = np.arange(1.0, 41.0, dtype=np.float64)
    falling = np.array([1.0 - 0.01 * unit for unit in units])
    fitted = fit_linear("x", np.column_stack([np.ones(40), units]), falling, random.Random(1), scale=0.03)
    assert fitted.coefficients[1] == pytest.approx(0.0, abs=1e-6)
    assert fitted.coefficients[0] > 0


def test_the_error_is_that_of_samples_the_fit_has_not_seen() -> None:
    # A feature for each sample: what was seen is met exactly, of what was not nothing is known.
    fitted = fit_linear("x", np.eye(10), np.full(10, 2.0), random.Random(1), scale=0.03)
    assert fitted.ratios == pytest.approx(1.0, rel=1e-5)
    assert fitted.error.mape == pytest.approx(1.0)
    assert fitted.error.sample_count == 10


def test_contention_that_nothing_tells_of_is_none() -> None:
    always = [step("w", float(n), [Part(f"d.{n}", 1, 50 * n, True)], (0.0, 1.0)) for n in range(1, 60)]
    prefills = [step("w", float(n), [Part(f"p.{n}", 10 * n, 0, True)], (0.0, 0.0)) for n in range(1, 60)]
    fitted = fit_steps([*always, *prefills], random.Random(1), kv_bytes_per_token=1)
    assert fitted.contention == Contention()


def test_steps_beside_strangers_are_left_out_while_enough_are_left() -> None:
    quiet = many_steps(400, lambda: 1.0)
    disturbed = [dataclasses.replace(each, others_share=0.8) for each in many_steps(400, lambda: 3.0)]
    fitted = fit_steps([*quiet, *disturbed], random.Random(1), kv_bytes_per_token=1)
    assert fitted.cost.decode.base_s == pytest.approx(COST.decode.base_s, rel=1e-3)
    assert fitted.facts["disturbed_share"] == 0.5
    fitted = fit_steps(disturbed, random.Random(1), kv_bytes_per_token=1)
    assert fitted.cost.decode.base_s == pytest.approx(3 * COST.decode.base_s, rel=1e-3)
    assert "used" in fitted.facts["disturbed_steps"]


def test_steps_that_pulled_do_not_tell_what_a_step_costs() -> None:
    plain = many_steps(400, lambda: 1.0)
    pulled = [dataclasses.replace(each, pull_count=1) for each in many_steps(400, lambda: 1.2)]
    fitted = fit_steps([*plain, *pulled], random.Random(1), kv_bytes_per_token=1)
    assert fitted.cost.decode.base_s == pytest.approx(COST.decode.base_s, rel=1e-3)
    assert fitted.facts["steps"]["decode"] == 300


def test_too_little_is_said_and_not_fitted() -> None:
    with pytest.raises(FitImpossible, match="prefill steps: 0 samples"):
        fit_steps([step("w", 1.0, [Part("a.1", 1, 5, True)], (0, 0))] * 5, random.Random(1), kv_bytes_per_token=1)


def observed_alone() -> Observed:
    """Prompts asked one at a time of 1 prefill + 1 decode with ``OVERHEADS`` and ``LINK``."""
    steps: list[Step] = []
    answers: list[Answered] = []
    now = 10.0
    for number in range(60):
        length = 16 + 8 * number
        sent_at = now
        queued_at = sent_at + OVERHEADS.admit.at(length)
        first = step("prefill-0", queued_at, [Part(f"g{number}.1.0-x", length, 0, True, queued_at)], (0.0, 0.0))
        token_at = [first.until + OVERHEADS.first_token.at(length)]
        queued_at = first.until + OVERHEADS.handoff.at(length)
        kv_bytes = 23_040 * 128 * (length // 128 + 1)
        steps.append(first)
        begins_at = queued_at + LINK.transfer_s(kv_bytes)
        for index in range(5):
            part = Part(f"g{number}.2.0-y", 1, length + index, True, None if index else queued_at)
            made = step("decode-0", begins_at, [part], (0.0, 0.0))
            made = dataclasses.replace(made, entered_at=queued_at if not index else begins_at, pull_count=not index)
            steps.append(made)
            token_at.append(made.until + OVERHEADS.token.at(1))
            begins_at = made.until
        answers.append(
            Answered(
                generation_id=f"g{number}",
                prompt_token_count=length,
                was_alone=True,
                sent_at=sent_at,
                token_at=tuple(token_at),
                kv_transfer_bytes=kv_bytes,
                cached_token_count=0,
                prefill_worker_id="prefill-0",
                decode_worker_id="decode-0",
            )
        )
        now = begins_at + 0.1
    return Observed("1 prefill + 1 decode", tuple(steps), tuple(answers), {"core_count": 7})


def test_overheads_and_the_link_are_found_between_the_steps() -> None:
    observed = observed_alone()
    steps = fit_steps(observed.steps, random.Random(1), kv_bytes_per_token=23_040)
    fitted = fit_overheads([observed], steps, random.Random(1))
    assert fitted.overheads.admit.at(200) == pytest.approx(OVERHEADS.admit.at(200), rel=1e-3)
    assert fitted.overheads.handoff.at(200) == pytest.approx(OVERHEADS.handoff.at(200), rel=1e-3)
    assert fitted.overheads.first_token.at(200) == pytest.approx(0.002, rel=1e-3)
    assert fitted.overheads.token.at(1) == pytest.approx(OVERHEADS.token.at(1), rel=1e-3)
    assert fitted.link is not None
    assert fitted.link.bytes_per_s == pytest.approx(LINK.bytes_per_s, rel=0.01)
    assert fitted.link.latency_s == pytest.approx(LINK.latency_s, rel=0.01)
    assert fitted.overheads.pulled_step.at(1) == pytest.approx(0.0, abs=1e-4)


def test_tokens_that_stood_in_line_are_counted_and_left_out() -> None:
    observed = observed_alone()
    steps = fit_steps(observed.steps, random.Random(1), kv_bytes_per_token=23_040)
    late = [
        dataclasses.replace(answer, token_at=(*answer.token_at[:3], *(at + 0.2 for at in answer.token_at[3:])))
        for answer in observed.answers
    ]
    fitted = fit_overheads([dataclasses.replace(observed, answers=tuple(late))], steps, random.Random(1))
    assert fitted.congested_share == 0.5
    assert fitted.overheads.token.at(1) == pytest.approx(OVERHEADS.token.at(1), rel=1e-3)
    assert fitted.noise["token"].at(0.999) == pytest.approx(1.0, rel=1e-3)


def test_an_answer_with_a_step_that_was_not_seen_is_no_sample() -> None:
    observed = observed_alone()
    steps = fit_steps(observed.steps, random.Random(1), kv_bytes_per_token=23_040)
    blind = dataclasses.replace(
        observed, steps=tuple(each for each in observed.steps if each.worker_id != "decode-0")
    )
    with pytest.raises(FitImpossible, match="admit: only 0 answers"):
        fit_overheads([blind], steps, random.Random(1))


def test_what_was_observed_is_kept_and_fits_the_same() -> None:
    observed = [observed_alone()]
    again = from_lines(to_lines(observed))
    assert again == observed
    made = make_profile(again, seed=3, kv_bytes_per_token=23_040, provenance={"model": "m"})
    assert made == make_profile(observed, seed=3, kv_bytes_per_token=23_040, provenance={"model": "m"})
    assert made.provenance["seed"] == 3
    assert {"prefill", "decode", "admit", "handoff", "pull", "token"} <= set(made.fit)
    with pytest.raises(ValueError, match="line 1"):
        from_lines(['{"record": "step"}'])


def line(worker: str, entered: float, began: float, ended: float, requests: list[list[object]]) -> str:
    keys = {"entered_at": entered, "began_at": began, "ended_at": ended, "cpu_s": 0.5 * (ended - began)}
    return json.dumps({"engine_id": f"{worker}-abc", **keys, "requests": requests})


def test_a_step_log_tells_periods_pulls_and_what_the_neighbour_did() -> None:
    steps = read_steps(
        [
            line("decode-0", 1.000, 1.004, 1.030, [["a.2.0", 1, 64, True, 0.999]]),
            line("decode-0", 1.031, 1.031, 1.060, [["a.2.0", 1, 65, True, None]]),
            line("prefill-0", 1.040, 1.040, 1.540, [["b.1.0", 512, 0, False, 1.0]]),
            line("prefill-0", 1.541, 1.541, 1.700, [["b.1.0", 100, 512, True, None]]),
            line("decode-0", 1.600, 1.600, 1.640, [["a.2.0", 1, 66, True, None], ["c.1.0", 30, 0, True, 1.55]]),
        ]
    )
    first, second, chunk, last_chunk, mixed = steps
    assert (first.kind, first.pull_count) == ("decode", 1)
    assert first.duration_s == pytest.approx(0.027)
    assert (second.pull_count, second.went_on) == (0, False)
    assert second.duration_s == pytest.approx(0.029)
    assert second.overlap_s == {"prefill": pytest.approx(0.020), "decode": 0.0}
    assert chunk.overlap_s == {"prefill": 0.0, "decode": pytest.approx(0.020)}
    assert chunk.went_on
    assert chunk.duration_s == pytest.approx(0.501)
    assert last_chunk.chunks[0].context_token_count == 512
    assert mixed.kind == "mixed"
    assert mixed.context_token_counts == (66,)
    assert last_chunk.overlap_s["prefill"] == pytest.approx(0.040), "a mixed step counts as prefill"


def test_others_are_looked_up_for_the_whole_of_a_step() -> None:
    samples = [disturbance.Others(1.0, 0.0), disturbance.Others(1.5, 0.4), disturbance.Others(2.0, 0.1)]
    assert disturbance.others_during(samples, 0.2, 0.9) == 0.0
    assert disturbance.others_during(samples, 0.9, 1.1) == 0.4
    assert disturbance.others_during(samples, 1.6, 1.7) == 0.1
    assert disturbance.others_during(samples, 2.1, 2.2) == 0.0


@pytest.mark.parametrize("is_quick", [True, False])
@pytest.mark.parametrize("is_split", [True, False])
def test_what_is_asked_is_seeded_and_fits_the_memory(is_quick: bool, is_split: bool) -> None:
    def made(seed: int) -> Effort:
        return effort(is_quick=is_quick, is_split=is_split, seed=seed, running_limit=16, token_limit=6000)

    work = made(4)
    assert work == made(4)
    assert work != made(5)
    for wave in work.waves:
        assert 0 < sum(ask.prompt_token_count + ask.output_token_count for ask in wave) <= 6000
        assert len(wave) <= 16


def test_a_decode_step_costs_nothing_more_up_to_its_knee_and_by_the_sequence_beyond() -> None:
    cost = DecodeCost(0.0, 0.0, 0.001, per_sequence_beyond_knee_s=0.01, knee_sequence_count=3)
    assert [cost.work_s([5] * count) for count in (1, 3, 4, 6)] == pytest.approx([0.001, 0.003, 0.014, 0.036])
    with pytest.raises(ValueError, match="per_sequence_beyond_knee_s must be 0 or more"):
        DecodeCost(per_sequence_beyond_knee_s=-1.0)


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    profile = Profile(
        costs={"prefill": COST, "decode": CostModel()},
        link=LINK,
        overheads=OVERHEADS,
        contention=CONTENTION,
        noise={"decode": Noise((0.0, 0.5, 1.0), (0.9, 1.0, 2.5))},
        overhead_noise={"token": Noise((0.0, 1.0), (0.5, 3.0))},
        fit={"decode": FitError(1200, 0.013, -0.002, 0.4, 0.99)},
        provenance={"model": 'a "model"', "machine": {"cpu model": "x", "load": [0.1, 2]}, "is": True},
    )
    write_profile(tmp_path / "of" / "a.toml", profile)
    assert read_profile(tmp_path / "of" / "a.toml") == profile
    assert [each.name for each in (tmp_path / "of").iterdir()] == ["a.toml"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("schema = 1", "schema = 2"), "schema: is 2, this version reads 1"),
        (("[link]", "[lnk]"), "lnk: is not known"),
        (("latency_s = 0.001", 'latency_s = "fast"'), "link.latency_s: is no number"),
        (("latency_s = 0.001", "latency_s = -0.001"), "a link takes time"),
        (("latency_s = 0.001", "latency_s = nan"), "link.latency_s: is no number"),
        (("decode_by_decode = 0.0", "decode_by_decode = 1.5"), "decode_by_decode must be below 1"),
        (("[costs.decode]", "[costs.other]"), "costs"),
        (("[overheads.admit]", "[overheads.admittance]"), "overheads.admittance: is not known"),
        (("[overheads.admit]\nbase_s = 0.0", "[overheads.admit]\nbase_s = -1.0"), "Line.base_s must be 0 or more"),
        (("[noise.decode]\nshares = []", "[noise.decode]\nshares = [0.5]"), "as many shares as values"),
        (("[contention]", "[contention"), "not TOML"),
    ],
)
def test_a_file_that_is_no_profile_is_refused_by_its_key(tmp_path: Path, change: tuple[str, str], told: str) -> None:
    path = tmp_path / "profile.toml"
    write_profile(path, Profile())
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    with pytest.raises(ProfileError, match=told.replace("[", r"\[")):
        read_profile(path)


def test_noise_is_read_between_its_quantiles() -> None:
    noise = Noise((0.0, 0.5, 1.0), (0.8, 1.0, 2.0))
    assert [noise.at(share) for share in (0.0, 0.25, 0.5, 0.75, 0.999999)] == pytest.approx(
        [0.8, 0.9, 1.0, 1.5, 2.0], abs=1e-5
    )
    assert Noise().at(0.7) == 1.0


CONFIG = """
    [model]
    name = "m"
    path = "{model}"
    [prefill]
    count = 1
    [prefill.engine]
    kv_cache_bytes = 536870912
    {engine}
    [decode]
    count = 1
    {decode}
    [decode.engine]
    kv_cache_bytes = 536870912
    {engine}
"""


def command(tmp_path: Path, *more: str, engine: str = "", decode: str = "") -> int:
    (tmp_path / "config.json").write_text(
        json.dumps({"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576})
    )
    (tmp_path / "baton.toml").write_text(CONFIG.format(model=tmp_path, engine=engine, decode=decode))
    return calibrate.main(
        ["calibrate", "--config", str(tmp_path / "baton.toml"), "--out", str(tmp_path / "made.toml"), *more]
    )


def test_the_command_fits_what_was_kept_and_tells_the_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "seen.jsonl"
    kept.write_text("\n".join(to_lines([observed_alone()])))
    assert command(tmp_path, "--fit-from", str(kept)) == 0
    profile = read_profile(tmp_path / "made.toml")
    assert profile.costs["decode"].kv_bytes_per_token == 23_040
    assert profile.provenance["clusters"] == ["1 prefill + 1 decode"]
    assert profile.provenance["machine"] == {"core_count": 7}, "of then, not of now"
    told = capsys.readouterr().out
    assert "error on samples the fit had not seen" in told
    assert f"n {profile.fit['admit'].sample_count}" in told


def test_the_command_refuses_what_it_cannot_calibrate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tmp_path, engine='kind = "simulated"') == 2
    assert "needs real engines" in capsys.readouterr().err
    assert command(tmp_path, decode="cores_per_worker = 2") == 2
    assert "as many cores" in capsys.readouterr().err
    assert command(tmp_path, "--fit-from", str(tmp_path / "none.jsonl")) == 2
    (tmp_path / "empty.jsonl").write_text("")
    assert command(tmp_path, "--fit-from", str(tmp_path / "empty.jsonl")) == 1
    assert "prefill steps: 0 samples" in capsys.readouterr().err
    assert not (tmp_path / "made.toml").exists()


def test_the_profile_that_comes_with_baton_can_be_read_and_is_near_the_defaults() -> None:
    shipped = Path(__file__).resolve().parents[2] / "deploy" / "profiles" / "smollm2-135m-2core.toml"
    profile = read_profile(shipped)
    assert profile.provenance["model"] == "smollm2-135m-instruct"
    for chunks, contexts in (([Chunk(512)], []), ([], [300] * 8)):
        told = profile.costs["decode"].step_s(chunks, contexts)
        assert told == pytest.approx(CostModel().step_s(chunks, contexts), rel=0.3)
