"""The table of phases of ``baton generate --phases`` and ``baton demo``, and the line that ``baton chat`` prints.
Pure: a ``Finished`` to lines of text."""

from __future__ import annotations

from baton.client import Finished
from baton.timeline import Phase

_TITLES = {
    Phase.QUEUE: "queue",
    Phase.PREFILL: "prefill",
    Phase.HANDOFF_WAIT: "handoff wait",
    Phase.KV_TRANSFER: "KV transfer",
    Phase.DECODE_WAIT: "decode wait",
    Phase.DECODE: "decode",
}
_BAR_WIDTH = 24


def phase_lines(finished: Finished, client_total_s: float | None = None) -> list[str]:
    """Lines without line ends. ``client_total_s``: what the caller's own clock said, shown for comparison."""
    phases, usage = finished.phases, finished.usage
    total_s = phases.total_s
    lines = [f"{'phase':<13} {'ms':>10}  {'share':>6}"]
    for phase, title in _TITLES.items():
        share = phases[phase] / total_s if total_s > 0 else 0.0
        bar = "█" * round(share * _BAR_WIDTH)
        note = f"  {_transfer_note(finished)}" if phase is Phase.KV_TRANSFER else ""
        lines.append(f"{title:<13} {phases[phase] * 1e3:>10.2f}  {share:>6.1%} {bar}{note}")
    lines.append(f"{'sum':<13} {total_s * 1e3:>10.2f}")
    if client_total_s is not None:
        lines.append(f"{'client':<13} {client_total_s * 1e3:>10.2f}  its own clock, network included")
    lines.append("")
    if phases.time_to_first_token_s is not None:
        lines.append(f"time to first token  {phases.time_to_first_token_s * 1e3:.1f} ms")
        after_first_s = total_s - phases.time_to_first_token_s
        if usage.output_token_count > 1 and after_first_s > 0:
            lines.append(f"tokens per second    {(usage.output_token_count - 1) / after_first_s:.1f} after the first")
    lines.append(
        f"tokens               {usage.prompt_token_count} in ({usage.cached_prompt_token_count} from cache), "
        f"{usage.output_token_count} out"
    )
    mode = phases.placement_mode.value if phases.placement_mode is not None else "unknown"
    reason = f" ({phases.placement_reason})" if phases.placement_reason else ""
    lines.append(f"placed               {mode}{reason}, {_workers(finished)}")
    lines.append(f"attempts             {phases.attempt_count}")
    transfer = phases.transfer
    if transfer.pull_count:
        parts = f"post {_ms(transfer.post_s)}, wire {_ms(transfer.wire_s)}, verify {_ms(transfer.verify_s)}"
        speed = transfer.wire_bytes_per_s
        rate = "" if speed is None else f", {human_bytes(speed)}/s on the wire"
        count = "1 pull" if transfer.pull_count == 1 else f"{transfer.pull_count} pulls"
        lines.append(f"pulled               {count} of {transfer.descriptor_count} regions: {parts}{rate}")
    if transfer.recomputed_token_count:
        reason = "" if transfer.recompute_reason is None else f" ({transfer.recompute_reason.value})"
        redone = transfer.recomputed_token_count
        lines.append(f"recomputed           {redone} prompt tokens: their KV could not be used{reason}")
    lines.append(f"ended by             {_ending(finished)}")
    return lines


def summary_line(finished: Finished) -> str:
    """One line for after an answer: tokens, their pace, the first one, and each phase in ms."""
    phases, usage = finished.phases, finished.usage
    count = usage.output_token_count
    parts = ["1 token" if count == 1 else f"{count} tokens"]
    if phases.time_to_first_token_s is not None:
        after_first_s = phases.total_s - phases.time_to_first_token_s
        if count > 1 and after_first_s > 0:
            parts.append(f"{(count - 1) / after_first_s:.1f} tokens/s")
        parts.append(f"first after {phases.time_to_first_token_s * 1e3:.0f} ms")
    if finished.resume_count:
        parts.append("resumed once" if finished.resume_count == 1 else f"resumed {finished.resume_count} times")
    durations = ", ".join(f"{title} {phases[phase] * 1e3:.1f}" for phase, title in _TITLES.items())
    return f"[{', '.join(parts)}; ms: {durations}]"


def _transfer_note(finished: Finished) -> str:
    kv_bytes, transfer_s = finished.phases.kv_transfer_bytes, finished.phases[Phase.KV_TRANSFER]
    if kv_bytes == 0:
        return "nothing moved"
    size = human_bytes(kv_bytes)
    return f"{size} at {human_bytes(kv_bytes / transfer_s)}/s" if transfer_s > 0 else size


def _workers(finished: Finished) -> str:
    prefill, decode = finished.phases.prefill_worker_id, finished.phases.decode_worker_id
    if prefill and decode:
        return f"{prefill} → {decode}"
    return prefill or decode or "no worker named"


def _ending(finished: Finished) -> str:
    if finished.matched_stop_sequence is not None:
        return "a stop sequence"
    if finished.matched_stop_token_id is not None:
        return f"stop token {finished.matched_stop_token_id}"
    return (
        finished.reason.value.replace("_", " ")
        if finished.reason is not None
        else "a reason this client does not know"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def human_bytes(count: float) -> str:
    """Binary units, three digits: "1.38 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            digits = f"{count:.0f}" if unit == "B" or count >= 1000 else f"{count:.3g}"
            return f"{digits} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
