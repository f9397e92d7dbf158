"""A plan while it is made: sessions of requests, cut to the model's context and counted. Pure."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.traffic.plan import Plan, PlannedRequest
from bench.traffic.prompts import PromptMaker
from bench.traffic.sharing import prefix_hit_share

MAX_REQUEST_COUNT = 1_000_000
MAX_PROMPT_TOKEN_COUNT = 200_000_000
"""Of a whole plan, which is held in memory at one pointer a token."""


def fit_to_context(prompt_token_count: int, output_token_count: int, context_token_count: int) -> tuple[int, int]:
    """The two counts, cut so that their sum is at most the model's context; what fits stays as it is.

    Shared evenly: a count below half of the context is left whole and the other one is cut; two that are both longer
    get a half each, the prompt the odd token.
    """
    if context_token_count < 2:
        raise ValueError("a context has room for a token of prompt and one of output")
    if prompt_token_count + output_token_count <= context_token_count:
        return prompt_token_count, output_token_count
    output = min(output_token_count, max(context_token_count // 2, context_token_count - prompt_token_count))
    return min(prompt_token_count, context_token_count - output), output


@dataclass(slots=True, kw_only=True)
class _Drafted:
    at_s: float
    prompt_token_ids: tuple[int, ...]
    output_token_count: int
    group: str
    session_id: str
    cancel_after_s: float | None
    priority: int


class Draft:
    """Collects the requests of a plan. Randomness comes by name from the seed: no request shifts another."""

    def __init__(self, *, seed: int, prompts: PromptMaker, scale: float, context_token_count: int) -> None:
        if not (math.isfinite(scale) and 0 < scale <= 1000):
            raise ValueError(f"scale {scale:g} is not above 0 and at most 1000")
        if context_token_count < 2:
            raise ValueError("a context has room for a token of prompt and one of output")
        self.seed = seed
        self.prompts = prompts
        self.scale = scale
        self.context_token_count = context_token_count
        self.notes: Counter[str] = Counter()
        """What was cut or left out, for the facts."""
        self._sessions: list[list[_Drafted]] = []
        self._request_count = 0
        self._token_count = 0

    def rng(self, *name: object) -> random.Random:
        """A generator of its own for each name."""
        return random.Random(self.key(*name))  # noqa: S311 - a workload, no secret

    def key(self, *name: object) -> str:
        """Of a piece of prompt; of this seed only."""
        return "/".join(map(str, (self.seed, *name)))

    def session_id(self, kind: str, number: int) -> str:
        """Of this seed only: a router remembers where the sessions of the last run went."""
        return f"{kind}-{self.seed}-{number}"

    def shared(self, name: tuple[object, ...], count: int) -> tuple[int, ...]:
        """A piece that other prompts have, too."""
        return self.prompts.shared(self.key(*name), count)

    def unique(self, name: tuple[object, ...], count: int) -> tuple[int, ...]:
        """A piece that is made once."""
        return self.prompts.tokens(self.key(*name), count)

    def scaled(self, token_count: int) -> int:
        """A count of tokens by the one scale of the plan: 1 or more, unless it is 0."""
        return max(1, math.floor(token_count * self.scale + 0.5)) if token_count else 0

    def fits(self, prompt_token_count: int, output_token_count: int) -> bool:
        return prompt_token_count + output_token_count <= self.context_token_count

    def start(
        self,
        at_s: float,
        prompt_token_ids: Sequence[int],
        output_token_count: int,
        *,
        group: str = "all",
        session_id: str = "",
        cancel_after_s: float | None = None,
        priority: int = 0,
    ) -> None:
        """Adds a request that is due at a time of the run, cut to the context; it begins a session."""
        prompt_count, output_count = fit_to_context(
            len(prompt_token_ids), output_token_count, self.context_token_count
        )
        self.notes["prompts_cut"] += prompt_count < len(prompt_token_ids)
        self.notes["outputs_cut"] += output_count < output_token_count
        self._sessions.append([])
        self._append(
            _Drafted(
                at_s=at_s,
                prompt_token_ids=tuple(prompt_token_ids[:prompt_count]),
                output_token_count=output_count,
                group=group,
                session_id=session_id,
                cancel_after_s=cancel_after_s,
                priority=priority,
            )
        )

    def follow(self, pause_s: float, prompt_token_ids: Sequence[int], output_token_count: int) -> None:
        """Adds a turn to the session begun last, ``pause_s`` after the end of the turn before. It has to fit."""
        if not self.fits(len(prompt_token_ids), output_token_count):
            raise ValueError("a turn that does not fit the context would break the session's shared prefix")
        before = self._sessions[-1][-1]
        self._append(
            _Drafted(
                at_s=pause_s,
                prompt_token_ids=tuple(prompt_token_ids),
                output_token_count=output_token_count,
                group=before.group,
                session_id=before.session_id,
                cancel_after_s=None,
                priority=before.priority,
            )
        )

    def _append(self, drafted: _Drafted) -> None:
        self._request_count += 1
        self._token_count += len(drafted.prompt_token_ids)
        if self._request_count > MAX_REQUEST_COUNT or self._token_count > MAX_PROMPT_TOKEN_COUNT:
            raise ValueError(
                f"a plan holds at most {MAX_REQUEST_COUNT} requests and {MAX_PROMPT_TOKEN_COUNT} prompt tokens: "
                "take a lower rate, a shorter duration or a smaller scale"
            )
        self._sessions[-1].append(drafted)

    def plan(self, name: str, duration_s: float, facts: Mapping[str, object]) -> Plan:
        """The plan: sessions in order of their start, the turns of each one after the other."""
        if not self._sessions:
            raise ValueError("no request falls into the duration: take a longer one, or a higher rate")
        requests: list[PlannedRequest] = []
        for session in sorted(self._sessions, key=lambda session: session[0].at_s):
            for turn, drafted in enumerate(session):
                requests.append(
                    PlannedRequest(
                        index=len(requests),
                        at_s=drafted.at_s,
                        prompt_token_ids=drafted.prompt_token_ids,
                        output_token_count=drafted.output_token_count,
                        group=drafted.group,
                        session_id=drafted.session_id,
                        after=len(requests) - 1 if turn else None,
                        cancel_after_s=drafted.cancel_after_s,
                        priority=drafted.priority,
                    )
                )
        groups = sorted({request.group for request in requests})
        full = {
            "workload": name,
            **facts,
            "duration_s": duration_s,
            "seed": self.seed,
            "scale": self.scale,
            "context_token_count": self.context_token_count,
            "prompts": self.prompts.facts(),
            "request_count": len(requests),
            "session_count": len(self._sessions),
            "prefix_hit_share_infinite_cache": round(prefix_hit_share(r.prompt_token_ids for r in requests), 4),
            "groups": {group: _counts_of(r for r in requests if r.group == group) for group in groups},
            "cut": {note: count for note, count in sorted(self.notes.items()) if count},
        }
        return Plan(name=name, requests=tuple(requests), duration_s=duration_s, facts=full)


def _counts_of(requests: Iterable[PlannedRequest]) -> dict[str, object]:
    chosen = list(requests)
    return {
        "request_count": len(chosen),
        "prompt_tokens": summary_of([len(request.prompt_token_ids) for request in chosen]),
        "output_tokens": summary_of([request.output_token_count for request in chosen]),
    }


def summary_of(counts: Sequence[int]) -> dict[str, float]:
    """Sum, mean, p50, p95 and max of one or more counts. Percentiles are the smallest value that so many reach."""
    ordered = sorted(counts)
    return {
        "sum": sum(ordered),
        "mean": round(sum(ordered) / len(ordered), 3),
        "p50": ordered[math.ceil(0.50 * len(ordered)) - 1],
        "p95": ordered[math.ceil(0.95 * len(ordered)) - 1],
        "max": ordered[-1],
    }
