"""From observed steps and answers to a profile: robust, non-negative least squares on relative error. Pure.

Each fit minimises sum of rho((predicted - measured) / measured) with every coefficient 0 or more; rho is linear
beyond a few percent (soft L1), so that a step during which somebody else had the core does not bend the formula. Its
error is told on every fifth sample, which a first fit has not seen; the coefficients handed out are fitted to all.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls

from bench.simulation.observed import Answered, Observed
from bench.simulation.profile import KINDS, Contention, FitError, Line, Noise, Overheads, Profile
from bench.simulation.steps import Part, Step
from engine.cost import CostModel, DecodeCost, Link, PrefillCost

Floats = NDArray[np.float64]

QUIET_SHARE = 0.15
"""Steps during which others used more of one core than this are left out, while enough others are left."""
ENOUGH_QUIET = 15
ENOUGH = 30
"""For quantiles."""
HELD_OUT = 5
"""One sample of so many."""
NOISE_SHARES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 1.0)
NEIGHBOURS = ("prefill", "decode")
STEP_SCALE = 0.03
"""Where the penalty turns linear: the spread of undisturbed steps, relative."""
OVERHEAD_SCALE = 0.2
MOST_CONTENTION = 0.9
ENOUGH_BESIDE = 8
KNEES = range(2, 65)
CLEARLY = 0.97
CONGESTED_S = 0.05
"""A token that takes longer to its caller has waited in line behind others', which no line of units describes."""


class FitImpossible(ValueError):
    """Too little was observed. Says of what."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """``lost``: by neighbour, the share of speed lost while it is in a step."""

    coefficients: Floats
    lost: Floats
    error: FitError
    ratios: Floats
    """Measured over predicted, of every sample, in their order."""


def fit_linear(
    what: str,
    design: Floats,
    measured: Floats,
    rng: random.Random,
    *,
    scale: float,
    overlaps: Floats | None = None,
) -> Fitted:
    """``design``: samples x features; ``measured``: seconds; ``overlaps``: samples x neighbours, 0 to 1, the share of
    each sample during which that neighbour was busy. The model: design . b / (1 - overlaps . k), with b and k 0 or
    more. A k that nothing tells (no neighbour busy, or always) is 0."""
    count = len(measured)
    if count < max(3, design.shape[1]):
        raise FitImpossible(f"{what}: {count} samples are too few; run longer")
    overlaps = np.zeros((count, 0)) if overlaps is None else overlaps
    order = list(range(count))
    rng.shuffle(order)
    held = np.zeros(count, dtype=bool)
    held[order[: count // HELD_OUT]] = True
    first, first_lost = _solve(design[~held], measured[~held], overlaps[~held], scale)
    unseen = held if held.any() else ~held
    error = _error(_predict(design, overlaps, first, first_lost)[unseen], measured[unseen], count)
    coefficients, lost = _solve(design, measured, overlaps, scale)
    predicted = _predict(design, overlaps, coefficients, lost)
    return Fitted(coefficients, lost, error, measured / np.maximum(predicted, 1e-9))


def _predict(design: Floats, overlaps: Floats, coefficients: Floats, lost: Floats) -> Floats:
    result: Floats = (design @ coefficients) / (1.0 - overlaps @ lost)
    return result


def _solve(design: Floats, measured: Floats, overlaps: Floats, scale: float) -> tuple[Floats, Floats]:
    weighted = design / measured[:, None]
    sizes = np.abs(weighted).mean(axis=0)
    is_seen = sizes > 1e-12
    scaled = weighted[:, is_seen] / sizes[is_seen]
    told = _told(overlaps)
    shares = overlaps[:, told]
    feature_count = scaled.shape[1]
    start, _ = nnls(scaled, np.ones(len(measured)))

    def residuals(weights: Floats) -> Floats:
        result: Floats = (scaled @ weights[:feature_count]) / (1.0 - shares @ weights[feature_count:]) - 1.0
        return result

    def jacobian(weights: Floats) -> Floats:
        left = (1.0 - shares @ weights[feature_count:])[:, None]
        return np.hstack([scaled / left, (scaled @ weights[:feature_count])[:, None] * shares / left**2])

    limits = np.concatenate([np.full(feature_count, np.inf), np.full(shares.shape[1], MOST_CONTENTION / 2)])
    result = least_squares(
        residuals,
        np.concatenate([np.clip(start, 1e-9, None), np.full(shares.shape[1], 0.02)]),
        jac=jacobian,
        bounds=(0.0, limits),
        loss="soft_l1",
        f_scale=scale,
        xtol=1e-14,
        ftol=1e-14,
        gtol=1e-14,
        max_nfev=500,
    )
    coefficients, lost = np.zeros(design.shape[1]), np.zeros(overlaps.shape[1])
    coefficients[is_seen] = result.x[:feature_count] / sizes[is_seen]
    lost[told] = result.x[feature_count:]
    return coefficients, lost


def _told(overlaps: Floats) -> list[int]:
    """The neighbours of whose influence the samples tell: with it at times, and at times with none at all."""
    if not overlaps.size or int((overlaps.sum(axis=1) < 0.2).sum()) < ENOUGH_BESIDE:
        return []
    return [index for index in range(overlaps.shape[1]) if int((overlaps[:, index] > 0.5).sum()) >= ENOUGH_BESIDE]


def _error(predicted: Floats, measured: Floats, sample_count: int) -> FitError:
    relative = np.abs(predicted - measured) / measured
    spread = float(((measured - measured.mean()) ** 2).sum())
    left = float(((measured - predicted) ** 2).sum())
    return FitError(
        sample_count=sample_count,
        mape=round(float(relative.mean()), 5),
        bias=round(float(predicted.sum() / measured.sum() - 1.0), 5),
        worst=round(float(relative.max()), 5),
        r_squared=round(1.0 - left / spread, 5) if spread > 0 else 1.0,
    )


def noise_of(ratios: Floats) -> Noise:
    if len(ratios) < ENOUGH:
        return Noise()
    return Noise(NOISE_SHARES, tuple(round(float(each), 4) for each in np.quantile(ratios, NOISE_SHARES)))


# -- steps --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StepsFitted:
    cost: CostModel
    contention: Contention
    noise: Mapping[str, Noise]
    errors: Mapping[str, FitError]
    facts: Mapping[str, Any]


def fit_steps(steps: Sequence[Step], rng: random.Random, *, kv_bytes_per_token: int) -> StepsFitted:
    """Of engines that are alike. Raises ``FitImpossible``. Steps that pulled are left out: their first milliseconds
    are another matter."""
    ordinary = [step for step in steps if not step.pull_count]
    used, facts = _undisturbed(ordinary)
    by_kind = {kind: [step for step in used if step.kind == kind] for kind in KINDS}
    prefill, decode = by_kind["prefill"], by_kind["decode"]
    design = np.array([_prefill_features(step) for step in prefill]).reshape(len(prefill), 3)
    more: dict[str, Any] = {"scale": STEP_SCALE}
    fitted = {
        "prefill": fit_linear("prefill steps", design, _durations(prefill), rng, overlaps=_overlaps(prefill), **more)
    }
    knee, fitted["decode"] = _fit_decode(decode, rng)
    p, d = fitted["prefill"].coefficients, fitted["decode"].coefficients
    cost = CostModel(
        PrefillCost(float(p[0]), float(p[1]), float(p[2])),
        DecodeCost(
            base_s=float(d[0]),
            per_context_token_s=float(d[1]),
            per_sequence_s=float(d[2]),
            per_sequence_beyond_knee_s=float(d[3]) if knee else 0.0,
            knee_sequence_count=knee,
        ),
        kv_bytes_per_token=kv_bytes_per_token,
    )
    contention = Contention(
        prefill_by_prefill=float(fitted["prefill"].lost[0]),
        prefill_by_decode=float(fitted["prefill"].lost[1]),
        decode_by_prefill=float(fitted["decode"].lost[0]),
        decode_by_decode=float(fitted["decode"].lost[1]),
    )
    errors = {kind: each.error for kind, each in fitted.items()}
    ratios = {kind: _work_ratios(each, cost, contention) for kind, each in by_kind.items()}
    noise = {kind: noise_of(each) for kind, each in ratios.items()}
    if len(by_kind["mixed"]) >= ENOUGH:
        mixed = by_kind["mixed"]
        predicted = np.array([predicted_s(step, cost, contention) for step in mixed])
        errors["mixed"] = _error(predicted, _durations(mixed), len(mixed))  # nothing of it is fitted: all unseen
    facts = {**facts, "steps": {kind: len(each) for kind, each in by_kind.items()}}
    facts["overlap_s"] = {
        f"{kind}_by_{neighbour}": round(sum(step.overlap_s.get(neighbour, 0.0) for step in by_kind[kind]), 1)
        for kind in ("prefill", "decode")
        for neighbour in NEIGHBOURS
    }
    return StepsFitted(cost, contention, noise, errors, facts)


def _fit_decode(steps: Sequence[Step], rng: random.Random) -> tuple[int, Fitted]:
    """The knee that the steps themselves choose: 0, for none, unless another makes the penalty clearly smaller.
    Batches on both sides must have been seen."""
    seen = {len(step.context_token_counts) for step in steps}
    candidates = [knee for knee in KNEES if min(seen, default=0) < knee and sum(count > knee for count in seen) > 1]
    state = rng.getstate()
    best: tuple[float, int, Fitted] | None = None
    for knee in (0, *candidates):
        rng.setstate(state)  # the same samples are held out for each
        width = 4 if knee else 3
        design = np.array([_decode_features(step, knee)[:width] for step in steps]).reshape(len(steps), width)
        fitted = fit_linear(
            "decode steps", design, _durations(steps), rng, scale=STEP_SCALE, overlaps=_overlaps(steps)
        )
        penalty = _penalty(fitted.ratios)
        if best is None or penalty < best[0] * (CLEARLY if best[1] == 0 else 1.0) - 1e-9:
            best = (penalty, knee, fitted)
    assert best is not None
    return best[1], best[2]


def _penalty(ratios: Floats) -> float:
    """Mean of rho, as ``_solve`` minimises it."""
    relative = (1.0 / np.maximum(ratios, 1e-9) - 1.0) / STEP_SCALE
    return float((2.0 * (np.sqrt(1.0 + relative**2) - 1.0)).mean())


def predicted_s(step: Step, cost: CostModel, contention: Contention) -> float:
    """With the share of overlap that was."""
    return cost.step_s(step.chunks, step.context_token_counts) / _speed(step, contention)


def _speed(step: Step, contention: Contention) -> float:
    """Of 1, on the mean over the step."""
    is_prefill = step.kind != "decode"
    return 1.0 - sum(
        contention.share(is_prefill=is_prefill, neighbour_is_prefill=neighbour == "prefill") * share
        for neighbour, share in zip(NEIGHBOURS, _overlap_shares(step), strict=True)
    )


def _work_ratios(steps: Sequence[Step], cost: CostModel, contention: Contention) -> Floats:
    """Of the work alone, what neighbours took being taken off: what a simulator multiplies the work with."""
    return np.array([step.duration_s / predicted_s(step, cost, contention) for step in steps])


def _undisturbed(steps: Sequence[Step]) -> tuple[list[Step], dict[str, Any]]:
    quiet = [step for step in steps if step.others_share <= QUIET_SHARE]
    facts: dict[str, Any] = {
        "disturbed_share": round(1.0 - len(quiet) / max(1, len(steps)), 3),
        "disturbed_steps": "left out",
    }
    for kind in ("prefill", "decode"):
        if sum(step.kind == kind for step in quiet) < ENOUGH_QUIET:
            facts["disturbed_steps"] = f"used: too few {kind} steps without others on the machine"
            return list(steps), facts
    return quiet, facts


def _overlaps(steps: Sequence[Step]) -> Floats:
    return np.array([_overlap_shares(step) for step in steps]).reshape(len(steps), len(NEIGHBOURS))


def _overlap_shares(step: Step) -> list[float]:
    return [min(1.0, step.overlap_s.get(each, 0.0) / max(step.duration_s, 1e-9)) for each in NEIGHBOURS]


def _durations(steps: Sequence[Step]) -> Floats:
    return np.array([step.duration_s for step in steps])


def _prefill_features(step: Step) -> tuple[float, ...]:
    """As ``PrefillCost`` has them."""
    linear = sum(chunk.new_token_count for chunk in step.chunks)
    squared = sum(c.new_token_count * (c.new_token_count + 2 * c.context_token_count) for c in step.chunks)
    return 1.0, linear, squared


def _decode_features(step: Step, knee: int) -> tuple[float, ...]:
    """As ``DecodeCost`` has them."""
    contexts = step.context_token_counts
    return 1.0, sum(contexts), len(contexts), max(0, len(contexts) - knee)


# -- what is not a step -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Journey:
    """One answer and the steps that made it: of its first leg, and of its second where it was handed over."""

    answer: Answered
    legs: tuple[tuple[tuple[Step, Part], ...], ...]

    @property
    def with_tokens(self) -> list[Step]:
        """The step of each token, in order."""
        return [step for leg in self.legs for step, part in leg if part.has_token]


def journeys(observed: Observed) -> list[Journey]:
    """Answers whose steps were all seen; legs are named after the generation: "<generation>.<leg>...."."""
    legs: dict[str, dict[str, list[tuple[Step, Part]]]] = {}
    for step in observed.steps:
        for part in step.parts:
            generation_id, _, rest = part.request_id.partition(".")
            legs.setdefault(generation_id, {}).setdefault(rest.partition(".")[0], []).append((step, part))
    found = []
    for answer in observed.answers:
        by_leg = legs.get(answer.generation_id, {})
        journey = Journey(answer, tuple(tuple(by_leg[leg]) for leg in sorted(by_leg)))
        if len(journey.with_tokens) == len(answer.token_at):
            found.append(journey)
    return found


@dataclass(frozen=True, slots=True)
class OverheadsFitted:
    overheads: Overheads
    link: Link | None
    """None: nothing was handed over."""
    congested_share: float
    """Of tokens, those left out because they waited in line on their way."""
    noise: Mapping[str, Noise]
    errors: Mapping[str, FitError]


def fit_overheads(observed: Sequence[Observed], steps: StepsFitted, rng: random.Random) -> OverheadsFitted:
    """Raises ``FitImpossible`` where no answer could be followed through its steps."""
    travelled = [each for one in observed for each in journeys(one)]
    samples = _overhead_samples(travelled, steps, QUIET_SHARE)
    if len(samples["admit"]) < ENOUGH_BESIDE:  # as for steps; ``disturbed_steps`` says it
        samples = _overhead_samples(travelled, steps, math.inf)
    ways_s = [
        at - step.until for each in travelled for step, at in zip(each.with_tokens, each.answer.token_at, strict=True)
    ]
    congested_share = sum(way_s > CONGESTED_S for way_s in ways_s) / max(1, len(ways_s))
    lines: dict[str, Line] = {}
    noise: dict[str, Noise] = {}
    errors: dict[str, FitError] = {}
    for name in ("admit", "first_token", "token"):
        if len(samples[name]) < 3:
            raise FitImpossible(f"{name}: only {len(samples[name])} answers could be followed through their steps")
    for name, pairs in samples.items():
        if len(pairs) < 3:
            continue
        if name == "pulled_step":
            # A difference of two like numbers, which may be negative: no relative error, and no line.
            lines[name] = Line(0.0, max(0.0, float(np.median([seconds for _, seconds in pairs]))))
            continue
        units, seconds = np.array(pairs).T
        design = np.column_stack([np.ones(len(units)), units])
        fitted = fit_linear(name, design, np.maximum(seconds, 1e-5), rng, scale=OVERHEAD_SCALE)
        lines[name] = Line(float(fitted.coefficients[0]), float(fitted.coefficients[1]))
        errors[name] = fitted.error
        if len(pairs) >= ENOUGH:
            noise[name] = noise_of(fitted.ratios)
    pull = lines.pop("pull", None)
    link = None
    if pull is not None:
        link = Link(pull.base_s, 1.0 / max(pull.per_unit_s, 1e-12))
    return OverheadsFitted(Overheads(**lines), link, round(congested_share, 4), noise, errors)


def _overhead_samples(
    travelled: Sequence[Journey], steps: StepsFitted, quiet_share: float
) -> dict[str, list[tuple[float, float]]]:
    """By name, (units, seconds). What waits for an engine's step is taken only of requests that were alone."""
    samples: dict[str, list[tuple[float, float]]] = {
        name: [] for name in ("admit", "first_token", "token", "handoff", "pulled_step", "pull")
    }
    for journey in travelled:
        answer, first = journey.answer, journey.legs[0]
        made = journey.with_tokens
        if all(step.others_share <= quiet_share for step in made):
            for index, (step, at) in enumerate(zip(made, answer.token_at, strict=True)):
                # From where the simulated step ends: what lies between two steps is in the step's time already.
                way_s = at - step.until
                if way_s > CONGESTED_S or step.pull_count:
                    continue
                if index:
                    samples["token"].append((len(step.parts), way_s))
                else:
                    samples["first_token"].append((answer.prompt_token_count, way_s))
        if len(journey.legs) > 1:
            taken_over = journey.legs[1][0][0]
            if taken_over.pull_count == 1 and answer.kv_transfer_bytes and taken_over.others_share <= quiet_share:
                samples["pull"].append((answer.kv_transfer_bytes, taken_over.began_at - taken_over.entered_at))
        if answer.was_alone and first[0][0].others_share <= quiet_share:
            queued_at = first[0][1].queued_at
            if queued_at is not None:
                samples["admit"].append((answer.prompt_token_count, queued_at - answer.sent_at))
            if len(journey.legs) > 1:
                step, part = journey.legs[1][0]
                if part.queued_at is not None:
                    samples["handoff"].append((answer.prompt_token_count, part.queued_at - made[0].until))
                longer_s = step.duration_s - predicted_s(step, steps.cost, steps.contention)
                samples["pulled_step"].append((1.0, longer_s))
    return samples


def make_profile(
    observed: Sequence[Observed], *, seed: int, kv_bytes_per_token: int, provenance: Mapping[str, Any]
) -> Profile:
    """Raises ``FitImpossible``."""
    rng = random.Random(f"fit/{seed}")  # noqa: S311 which samples are held out
    steps = fit_steps([step for each in observed for step in each.steps], rng, kv_bytes_per_token=kv_bytes_per_token)
    overheads = fit_overheads(observed, steps, rng)
    return Profile(
        costs={"prefill": steps.cost, "decode": steps.cost},
        link=overheads.link or Link(),
        overheads=overheads.overheads,
        contention=steps.contention,
        noise=steps.noise,
        overhead_noise=overheads.noise,
        fit={**steps.errors, **overheads.errors},
        provenance={**provenance, "seed": seed, **steps.facts, "congested_share": overheads.congested_share},
    )
