"""Runs a script of facts against a handoff and writes down what it decides.

A script is blocks of a command, ``----``, and what comes of it; lines that begin with # are comments. After each Emit
the script's reader says Emitted, unless the request was made with ``acks=manual``.
"""

from __future__ import annotations

from typing import Any

from baton.errors import (
    BatonError,
    FieldViolation,
    cache_too_small,
    deadline_exceeded,
    draining,
    engine_failed,
    invalid_request,
    no_room,
    no_worker,
    ticket_refused,
)
from baton.leg import KvAdopted, PrefillReply
from baton.request import LegFinish, PlacementMode
from router.answering import RoutedRequest
from router.cluster_view import WorkerIdentity
from router.handoff import Handoff
from router.handoff_words import (
    Abandon,
    Action,
    Adopted,
    CancelLeg,
    ClientGone,
    DeadlinePassed,
    DecodeEnded,
    Emit,
    Emitted,
    Fact,
    Fail,
    FindRoom,
    Finish,
    KeepLease,
    LegFailed,
    Place,
    Placed,
    PlacementFailed,
    PrefillDone,
    ReleaseKv,
    RoomFailed,
    RoomFound,
    StartDecode,
    StartPrefill,
    StopMatched,
    TellPrompt,
    TokensArrived,
    WorkerLost,
)
from router.placement import Placement

ERRORS: dict[str, BatonError] = {
    "engine_failed": engine_failed("w", "the engine died"),
    "ticket_refused": ticket_refused("replayed"),
    "draining": draining(),
    "deadline": deadline_exceeded("decode", 0),
    "invalid": invalid_request([FieldViolation("sampling.top_p", "must be above 0")]),
    "no_worker": no_worker("decode", 0),
    "no_room": no_room(7, 2, 0.25),
    "too_small": cache_too_small(100, 7, 5),
}


class Script:
    """One handoff and the commands it is driven by."""

    def __init__(self) -> None:
        self.handoff: Handoff | None = None
        self._is_acking = True

    def run(self, command: str) -> list[str]:
        """The command's outcome, one line per action."""
        name, *words = command.split()
        options = dict(word.split("=", 1) for word in words if "=" in word)
        rest = [word for word in words if "=" not in word]
        if name == "request":
            return self._request(options)
        assert self.handoff is not None, "the script begins with a request"
        if name == "state":
            return [str(self.handoff.state.value), f"phase {self.handoff.phase.value}"]
        return self._show(self.handoff.on(_fact(name, rest, options))) or ["nothing"]

    def _request(self, options: dict[str, str]) -> list[str]:
        self._is_acking = options.get("acks", "auto") == "auto"
        request = RoutedRequest(
            generation_id="g",
            prompt_token_ids=tuple(range(1, int(options.get("prompt", "3")) + 1)),
            max_output_token_count=int(options.get("max", "4")),
            eos_token_ids=(0,),
            is_context_bound=options.get("context_bound") == "yes",
        )
        self.handoff = Handoff(request, max_attempt_count=int(options.get("attempts", "3")))
        return self._show(self.handoff.start())

    def _show(self, actions: list[Action]) -> list[str]:
        assert self.handoff is not None
        lines = []
        for action in actions:
            lines.append(_action_text(action))
            if isinstance(action, Emit) and self._is_acking:
                ack = Emitted(action.first_index + len(action.token_ids))
                lines += self._show(self.handoff.on(ack))
        return lines


def _fact(name: str, words: list[str], options: dict[str, str]) -> Fact:
    leg = int(options.get("leg", "0"))
    match name:
        case "placed":
            prefill, decode = options.get("prefill"), options["decode"]
            mode = PlacementMode.SPLIT if prefill else PlacementMode.LOCAL
            placement = Placement(_worker(prefill) if prefill else None, _worker(decode), mode, "scripted")
            return Placed(int(options.get("attempt", "1")), placement)
        case "not-placed":
            return PlacementFailed(int(options.get("attempt", "1")), ERRORS[words[0]])
        case "prefill-done":
            finish = LegFinish(options["finish"]) if "finish" in options else None
            ticket = options.get("ticket", "")
            reply = PrefillReply(int(options["token"]), finish, ticket.encode(), ticket, 0.0, 0.0, 0, 0)
            return PrefillDone(leg, reply)
        case "adopted":
            recomputed = int(options.get("recomputed", "0"))
            is_with_tokens = "with-tokens" in words
            return Adopted(leg, KvAdopted(0.0, 0.0, 0.0, 10, 1, recomputed, 0.0, 0, is_with_tokens=is_with_tokens))
        case "tokens":
            return TokensArrived(leg, int(options["from"]), tuple(int(word) for word in words))
        case "decode-ended":
            return DecodeEnded(leg, int(options["count"]), LegFinish(options["finish"]))
        case "leg-failed":
            return LegFailed(leg, ERRORS[words[0]])
        case "room-found":
            return RoomFound(leg, _worker(options["decode"]))
        case "room-failed":
            return RoomFailed(leg, ERRORS[words[0]])
        case "worker-lost":
            return WorkerLost(_worker(words[0]))
        case "emitted":
            return Emitted(int(words[0]))
        case "stop-matched":
            return StopMatched(int(words[0]))
        case "deadline":
            return DeadlinePassed()
        case "client-gone":
            return ClientGone()
    raise AssertionError(f"unknown command {name!r}")


def _worker(name: str) -> WorkerIdentity:
    worker_id, _, epoch = name.partition("/")
    return WorkerIdentity(worker_id, epoch or "e1")


def _action_text(action: Action) -> str:
    match action:
        case Place():
            excluded = " ".join(sorted(worker.worker_id for worker in action.excluded))
            recompute = " recompute" if action.needs_recompute else ""
            return f"place attempt={action.attempt}{' not on ' + excluded if excluded else ''}{recompute}"
        case StartPrefill():
            return f"start-prefill leg={action.leg} on {action.worker.worker_id}: {_order_text(action.order)}"
        case StartDecode():
            ticket = f" with {action.order.ticket.decode()}" if action.order.ticket else " without ticket"
            return f"start-decode leg={action.leg} on {action.worker.worker_id}{ticket}: {_order_text(action.order)}"
        case FindRoom():
            barred = " ".join(sorted(worker.worker_id for worker in action.barred))
            otherwise = "" if action.otherwise is None else f" or {action.otherwise.reason.value}"
            wanted = f"{action.wanted_block_count} blocks, refused by {action.refused_by.worker_id}"
            return f"find-room leg={action.leg}: {wanted}, not on {barred or 'nobody'}{otherwise}"
        case CancelLeg():
            return f"cancel-leg leg={action.leg}"
        case KeepLease():
            return f"keep-lease {action.ticket_id} on {action.worker.worker_id}"
        case ReleaseKv():
            return f"release-kv {action.ticket_id} on {action.worker.worker_id}"
        case Emit():
            return f"emit from={action.first_index}: {' '.join(map(str, action.token_ids))}"
        case TellPrompt():
            return "tell-prompt"
        case Finish():
            token = "" if action.matched_stop_token_id is None else f" at token {action.matched_stop_token_id}"
            return f"FINISH {action.reason.value}{token}, {action.output_token_count} tokens"
        case Fail():
            return f"FAIL {action.error.status.value} {action.error.reason.value}: {action.error.message}"
        case Abandon():
            return "ABANDON"


def _order_text(order: Any) -> str:
    return f"{order.leg_id}, prompt {list(order.prompt_token_ids)}, at most {order.stop.max_token_count}"
