"""What ``--json`` prints: one object a line, ``event`` first. Pure. The fields are documented in ``docs/api/cli.md``.

Fields are added, never renamed: programs read this.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from typing import Any

from baton.errors import BatonError
from baton.events import Chunk, Event, Finished, PhaseTimings, PromptPart, SampleResult, Started, TokenLogprob
from baton.models import Model
from baton.request import ToolCall
from baton.status_client import ServiceStatus
from baton.timeline import PHASES


def json_line(value: dict[str, Any]) -> str:
    """Readable where the output can carry every character, and escaped where it cannot."""
    can_carry_all = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "").startswith("utf")
    return json.dumps(value, ensure_ascii=not can_carry_all, allow_nan=False)


def event_as_json(event: Event) -> dict[str, Any]:
    match event:
        case Started():
            # Without the resume token: it is a secret, and the command resumes by itself.
            return {
                "event": "started",
                "generation_id": event.generation_id,
                "model": event.model,
                "prompt_token_count": event.prompt_token_count,
                "time_allowed_s": event.time_allowed_s,
                "resume_grace_s": event.resume_grace_s,
            }
        case PromptPart():
            return {
                "event": "prompt",
                "first_token_index": event.first_token_index,
                "text": event.text,
                "token_ids": list(event.token_ids),
                "token_count": event.token_count,
                "logprobs": _logprobs(event.logprobs),
            }
        case Chunk():
            return {
                "event": "chunk",
                "sample_index": event.sample_index,
                "first_token_index": event.first_token_index,
                "text": event.text,
                "reasoning_text": event.reasoning_text,
                "tool_calls": [
                    {"index": each.index, "id": each.id, "name": each.name, "arguments_json": each.arguments_json}
                    for each in event.tool_call_deltas
                ],
                "token_ids": list(event.token_ids),
                "token_count": event.token_count,
                "logprobs": _logprobs(event.logprobs),
            }
        case Finished():
            return {
                "event": "finished",
                "reason": event.reason.value if event.reason else None,
                "matched_stop_sequence": event.matched_stop_sequence,
                "matched_stop_token_id": event.matched_stop_token_id,
                "cumulative_logprob": event.cumulative_logprob,
                "tool_calls": _tool_calls(event.tool_calls),
                "samples": [_sample(each) for each in event.samples],
                "usage": {
                    "prompt_token_count": event.usage.prompt_token_count,
                    "output_token_count": event.usage.output_token_count,
                    "cached_prompt_token_count": event.usage.cached_prompt_token_count,
                },
                "phases": _phases(event.phases),
                "resume_count": event.resume_count,
            }


def error_as_json(error: BatonError) -> dict[str, Any]:
    return {
        "event": "error",
        "status": error.status.value,
        "reason": error.reason.value,
        "message": error.message,
        "metadata": error.metadata,
        "violations": [{"field": each.field, "description": each.description} for each in error.violations],
        "is_retryable": error.is_retryable,
        "retry_after_s": error.retry_after_s,
    }


def model_as_json(model: Model) -> dict[str, Any]:
    can = model.capabilities
    return {
        "event": "model",
        "name": model.name,
        "max_context_token_count": model.max_context_token_count,
        "vocab_size": model.vocab_size,
        "end_token_ids": list(model.end_token_ids),
        "special_tokens": [{"token_id": each.token_id, "text": each.text} for each in model.special_tokens],
        "chat_template": model.chat_template,
        "capabilities": {
            "has_chat": can.has_chat,
            "has_tools": can.has_tools,
            "tool_parser": can.tool_parser,
            "reasoning_parser": can.reasoning_parser,
            "template_argument_names": list(can.template_argument_names),
            "max_sample_count": can.max_sample_count,
            "max_top_logprob_count": can.max_top_logprob_count,
            "has_resume": can.has_resume,
        },
    }


def status_as_json(status: ServiceStatus) -> dict[str, Any]:
    return {
        "event": "status",
        "is_serving": status.is_serving,
        "in_flight_count": status.in_flight_count,
        "queued_count": status.queued_count,
        "finished_count": status.finished_count,
        "failed_count": status.failed_count,
        "workers": [
            {
                "worker_id": each.worker_id,
                "role": each.role,
                "health": each.health,
                "assigned_count": each.assigned_count,
                "running_count": each.running_count,
                "waiting_count": each.waiting_count,
                "used_block_count": each.used_block_count,
                "block_count": each.block_count,
                "held_lease_count": each.held_lease_count,
                "kv_bytes_per_s": each.kv_bytes_per_s,
                "recomputed_share": each.recomputed_share,
                "no_room_count": each.no_room_count,
                "quarantined_pull_count": each.quarantined_pull_count,
            }
            for each in status.workers
        ],
        "phases": [
            {"name": each.name, "sample_count": each.sample_count, "p50_s": each.p50_s, "p95_s": each.p95_s}
            for each in status.phases
        ],
    }


def _finite(logprob: float) -> float | None:
    return logprob if math.isfinite(logprob) else None


def _logprobs(logprobs: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """JSON has no infinity: null for tokens that a structure does not allow."""
    return [
        {
            "token_id": each.token_id,
            "logprob": _finite(each.logprob),
            "rank": each.rank,
            "top": [[token_id, _finite(logprob)] for token_id, logprob in each.top],
        }
        for each in logprobs
    ]


def _tool_calls(calls: Iterable[ToolCall]) -> list[dict[str, Any]]:
    return [{"id": each.id, "name": each.name, "arguments_json": each.arguments_json} for each in calls]


def _sample(result: SampleResult) -> dict[str, Any]:
    return {
        "sample_index": result.sample_index,
        "reason": result.reason.value if result.reason else None,
        "matched_stop_sequence": result.matched_stop_sequence,
        "matched_stop_token_id": result.matched_stop_token_id,
        "output_token_count": result.output_token_count,
        "cumulative_logprob": result.cumulative_logprob,
        "tool_calls": _tool_calls(result.tool_calls),
    }


def _phases(phases: PhaseTimings) -> dict[str, Any]:
    transfer = phases.transfer
    return {
        **{f"{phase.value}_s": phases[phase] for phase in PHASES},
        "total_s": phases.total_s,
        "time_to_first_token_s": phases.time_to_first_token_s,
        "kv_transfer_bytes": transfer.kv_bytes,
        "kv_descriptor_count": transfer.descriptor_count,
        "kv_pull_count": transfer.pull_count,
        "kv_post_s": transfer.post_s,
        "kv_wire_s": transfer.wire_s,
        "kv_verify_s": transfer.verify_s,
        "kv_wire_bytes_per_s": transfer.wire_bytes_per_s,
        "handover": phases.handover.value if phases.handover else None,
        "prefill_worker_id": phases.prefill_worker_id,
        "decode_worker_id": phases.decode_worker_id,
        "attempt_count": phases.attempt_count,
        "placement_mode": phases.placement_mode.value if phases.placement_mode else None,
        "placement_reason": phases.placement_reason,
        "recomputed_token_count": transfer.recomputed_token_count,
        "recompute_reason": transfer.recompute_reason.value if transfer.recompute_reason else None,
    }
