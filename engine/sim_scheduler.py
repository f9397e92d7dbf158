"""Iteration-level scheduling as vLLM does it, without the computing: who gets blocks, who runs in the next step.

Owns the sequences of one simulated engine from ``add`` to ``remove``, and their blocks. Pure: times are passed in,
nothing waits. The mutable state is three collections, and a sequence is in at most one of them:

    waiting    no blocks yet; larger priority first, then first come first served
    placed     all blocks it can ever need, but not computing: pulling its KV, or pulled and waiting for a slot
    running    computing; at most ``max_running_count``

Admission reserves every block of prompt and answer, so nothing is ever preempted. The head of ``waiting`` is never
overtaken, so a large request cannot starve.
"""

from __future__ import annotations

import bisect
import enum
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from baton.request import EngineStop, LegFinish, TokenLogprobs
from engine.blocks import BlockHash, BlockPool, BlockTable, block_count_for, chain_hashes
from engine.cost import Chunk
from engine.sim_tokens import EMPTY_CONTENT, TokenRule, extend_content


class State(enum.Enum):
    WAITING = "waiting"
    PULLING = "pulling"
    PULLED = "pulled"
    RUNNING = "running"
    DONE = "done"


class Sequence:
    """One leg. ``token_ids`` grows by an output token whenever all of it is computed."""

    def __init__(
        self,
        *,
        order: int,
        prompt_token_ids: SequenceOf[int],
        stop: EngineStop,
        priority: int,
        block_token_count: int,
        max_context_token_count: int,
        is_prefill: bool,
        keeps_kv: bool = False,
        pull_token_count: int = 0,
        answer_token_count: int = 0,
        top_logprob_count: int | None = None,
        tenant: str = "",
        reads_cache: bool = True,
    ) -> None:
        """``answer_token_count``: how many of the last ``prompt_token_ids`` are the answer's already.
        ``reads_cache``: False computes all of the prompt."""
        self.token_ids = list(prompt_token_ids)
        self.prompt_token_count = len(self.token_ids)
        self.stop = stop
        self.is_prefill = is_prefill
        self.keeps_kv = keeps_kv
        self.pull_token_count = pull_token_count
        self.answered_before = answer_token_count
        self.top_logprob_count = top_logprob_count
        self.logprobs: list[TokenLogprobs] = []
        """One of each output token, if they are wanted."""
        self.salt = tenant.encode()
        self.reads_cache = reads_cache
        self.sort_key = (-priority, order)
        self.state = State.WAITING
        output_limit = 1 if is_prefill else stop.max_token_count
        # The last output token is never computed on, so its KV needs no room.
        needed = min(self.prompt_token_count + output_limit - 1, max_context_token_count)
        self.block_count = block_count_for(needed, block_token_count)
        # The last token of a prompt is always computed: without it there is nothing to sample from.
        self.hashes = list(chain_hashes(self.token_ids[:-1], block_token_count, salt=self.salt))
        self.table: BlockTable | None = None
        self.content = EMPTY_CONTENT
        self.computed_token_count = 0
        self.cached_token_count = 0
        self.published_block_count = 0
        self.finish: LegFinish | None = None
        self.scheduled_at: float | None = None
        """Start of its first step."""
        self.first_token_at: float | None = None

    @property
    def hashes_to_find(self) -> SequenceOf[BlockHash]:
        return self.hashes if self.reads_cache else ()

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.prompt_token_count :]

    @property
    def output_token_count(self) -> int:
        return len(self.token_ids) - self.prompt_token_count

    @property
    def needs_pull(self) -> bool:
        return self.pull_token_count > self.computed_token_count

    def __repr__(self) -> str:
        return (
            f"<Sequence {self.state.value}: {self.computed_token_count} of {len(self.token_ids)} tokens computed, "
            f"{self.output_token_count} new>"
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step computes. A single token counts as decoding, more as a chunk of a prompt."""

    decoding: tuple[Sequence, ...]
    chunks: tuple[tuple[Sequence, Chunk], ...]

    def __bool__(self) -> bool:
        return bool(self.decoding or self.chunks)

    @property
    def context_token_counts(self) -> tuple[int, ...]:
        return tuple(sequence.computed_token_count for sequence in self.decoding)

    @property
    def ends_a_prompt(self) -> bool:
        """Whether a prompt computed here will be complete after this step."""
        return any(
            chunk.context_token_count + chunk.new_token_count == len(sequence.token_ids)
            for sequence, chunk in self.chunks
        )


class Scheduler:
    def __init__(
        self,
        pool: BlockPool,
        rule: TokenRule,
        *,
        max_running_count: int,
        max_batched_token_count: int,
        max_context_token_count: int,
        admits_by_budget: bool = False,
        micro_batch_count: int = 1,
    ) -> None:
        """``admits_by_budget``: a waiting request gets blocks, and looks for its prefix, only when the step's budget
        reaches it, as in vLLM; otherwise as soon as there are blocks and a slot. ``micro_batch_count``: batches that
        take turns; sequences are dealt out to them in the order in which they came."""
        self.pool = pool
        self.admits_by_budget = admits_by_budget
        self.rule = rule
        self.max_running_count = max_running_count
        self.max_batched_token_count = max_batched_token_count
        self.max_context_token_count = max_context_token_count
        self._waiting: list[Sequence] = []
        self._placed: list[Sequence] = []
        self._running: list[Sequence] = []
        self._micro_batch_count = micro_batch_count
        self._turn = 0
        """Whose turn it is of the micro-batches."""

    @property
    def running_count(self) -> int:
        return len(self._running)

    @property
    def waiting_count(self) -> int:
        return len(self._waiting) + len(self._placed)

    @property
    def pulling_count(self) -> int:
        return sum(each.state is State.PULLING for each in self._placed)

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self._waiting, sequence, key=lambda each: each.sort_key)

    def pulled(self, sequence: Sequence, content: int | None) -> None:
        """The KV of ``pull_token_count`` tokens is in place. ``content`` stands for it, if it can be seen."""
        assert sequence.state is State.PULLING
        pulled = sequence.token_ids[: sequence.pull_token_count]
        sequence.content = extend_content(EMPTY_CONTENT, pulled) if content is None else content
        sequence.computed_token_count = sequence.pull_token_count
        self._publish(sequence)
        sequence.state = State.PULLED

    def pull_failed(self, sequence: Sequence) -> int:
        """The sequence computes the rest of its prompt itself. Returns how many tokens were to be pulled."""
        assert sequence.state is State.PULLING
        missing = sequence.pull_token_count - sequence.computed_token_count
        sequence.pull_token_count = 0
        sequence.state = State.PULLED
        return missing

    def admit(self) -> list[Sequence]:
        """Moves sequences up as far as slots and blocks go. Returns those that were given blocks."""
        self.start_pulled()
        admitted = []
        while self._waiting and self._has_budget() and self._can_admit(self._waiting[0]):
            sequence = self._waiting.pop(0)
            self._allocate(sequence)
            admitted.append(sequence)
            if sequence.needs_pull:
                sequence.state = State.PULLING
                self._placed.append(sequence)
            else:
                self._start(sequence)
        return admitted

    def start_pulled(self) -> None:
        """Requests whose KV is in place run, as far as slots go."""
        for sequence in [each for each in self._placed if each.state is State.PULLED]:
            if len(self._running) < self.max_running_count:
                self._placed.remove(sequence)
                self._start(sequence)

    def certain_step_count(self, sequence: Sequence) -> int:
        """So many steps of decoding the sequence has for certain, the one that ends it included: more than one only
        where nothing but its length can end it, and nothing but its tokens is wanted."""
        stop = sequence.stop
        if stop.stop_token_ids or stop.min_token_count or not self.rule.never_ends:
            return 1
        if sequence.top_logprob_count is not None:
            return 1  # each token has its own
        length = len(sequence.token_ids)
        by_limit = stop.max_token_count - length + sequence.prompt_token_count
        return max(1, min(by_limit, self.max_context_token_count - length))

    def schedule(self, now: float) -> Batch:
        """The next step: every decoding sequence, then prompts in order of admission as far as the budget goes; of
        several micro-batches only those of the one whose turn it is, which may be none."""
        budget = self.max_batched_token_count
        decoding, chunks = [], []
        running = self._running if self._micro_batch_count == 1 else self._next_micro_batch()
        for sequence in running:
            if len(sequence.token_ids) - sequence.computed_token_count == 1:
                decoding.append(sequence)
                budget -= 1
        for sequence in running:
            remaining = len(sequence.token_ids) - sequence.computed_token_count
            if remaining > 1 and budget > 0:
                chunk = Chunk(min(remaining, budget), sequence.computed_token_count)
                chunks.append((sequence, chunk))
                budget -= chunk.new_token_count
        for sequence in (*decoding, *(sequence for sequence, _ in chunks)):
            if sequence.scheduled_at is None:
                sequence.scheduled_at = now
        return Batch(tuple(decoding), tuple(chunks))

    def apply(self, batch: Batch, now: float) -> list[Sequence]:
        """The step was computed. Returns the sequences that have a new token, the finished ones among them.

        Sequences removed meanwhile are passed over.
        """
        steps = [(sequence, 1) for sequence in batch.decoding]
        steps += [(sequence, chunk.new_token_count) for sequence, chunk in batch.chunks]
        advanced = []
        for sequence, count in steps:
            if sequence.state is not State.RUNNING:
                continue
            start = sequence.computed_token_count
            sequence.content = extend_content(sequence.content, sequence.token_ids[start : start + count])
            sequence.computed_token_count += count
            self._publish(sequence)
            if sequence.computed_token_count == len(sequence.token_ids):
                self._sample(sequence, now)
                advanced.append(sequence)
        return advanced

    def apply_certain(self, batch: Batch, ends_at: SequenceOf[float]) -> list[Sequence]:
        """As ``apply`` for each of ``ends_at`` in turn, for a batch that only decodes and has so many certain steps
        (``certain_step_count``) of each sequence. Returns those that were not removed meanwhile."""
        assert not batch.chunks
        count = len(ends_at)
        advanced = []
        for sequence in batch.decoding:
            if sequence.state is not State.RUNNING:
                continue
            if sequence.first_token_at is None:
                sequence.first_token_at = ends_at[0]
            if count > 1:
                sequence.content = self.rule.go_on(sequence.content, sequence.token_ids, count - 1)
                sequence.computed_token_count += count - 1
            sequence.content = extend_content(sequence.content, sequence.token_ids[-1:])
            sequence.computed_token_count += 1
            self._publish(sequence)
            self._sample(sequence, ends_at[-1])
            advanced.append(sequence)
        return advanced

    def remove(self, sequence: Sequence) -> None:
        """Takes the sequence out wherever it is and frees its blocks. Idempotent."""
        for collection in (self._waiting, self._placed, self._running):
            if sequence in collection:
                collection.remove(sequence)
        sequence.state = State.DONE
        if sequence.table is not None:
            sequence.table.free()

    def take_table(self, sequence: Sequence) -> BlockTable:
        """The blocks of a finished prefill change owner: ``remove`` no longer frees them."""
        assert sequence.state is State.DONE
        table, sequence.table = sequence.table, None
        assert table is not None
        assert not table.is_freed
        return table

    def __repr__(self) -> str:
        return (
            f"<Scheduler [{len(self._running)} running, {len(self._placed)} placed | {len(self._waiting)} waiting]>"
        )

    def _next_micro_batch(self) -> list[Sequence]:
        turn, self._turn = self._turn, (self._turn + 1) % self._micro_batch_count
        return [each for each in self._running if each.sort_key[1] % self._micro_batch_count == turn]

    def _has_budget(self) -> bool:
        """Whether the next step has tokens left for one more."""
        if not self.admits_by_budget:
            return True
        wanted = sum(len(each.token_ids) - each.computed_token_count for each in self._running)
        return wanted < self.max_batched_token_count

    def _can_admit(self, sequence: Sequence) -> bool:
        if not self.pool.can_allocate(sequence.hashes_to_find, sequence.block_count):
            return False
        # A pull needs no slot. One whose KV is all cached already does, which only costs it a turn.
        return bool(sequence.pull_token_count) or len(self._running) < self.max_running_count

    def _allocate(self, sequence: Sequence) -> None:
        table = self.pool.allocate(sequence.hashes_to_find, sequence.block_count)
        sequence.table = table
        sequence.published_block_count = table.cached_block_count
        sequence.cached_token_count = table.cached_block_count * self.pool.block_token_count
        sequence.computed_token_count = sequence.cached_token_count
        sequence.content = extend_content(EMPTY_CONTENT, sequence.token_ids[: sequence.cached_token_count])

    def _start(self, sequence: Sequence) -> None:
        if len(self._running) < self.max_running_count:
            sequence.state = State.RUNNING
            self._running.append(sequence)
        else:
            sequence.state = State.PULLED
            self._placed.append(sequence)

    def _publish(self, sequence: Sequence) -> None:
        """Full blocks become reusable. An answer's blocks continue the chain of the prompt's."""
        assert sequence.table is not None
        size = self.pool.block_token_count
        for index in range(sequence.published_block_count, sequence.computed_token_count // size):
            if index == len(sequence.hashes):
                parent = sequence.hashes[-1] if sequence.hashes else None
                block = sequence.token_ids[index * size : (index + 1) * size]
                sequence.hashes += chain_hashes(block, size, salt=sequence.salt, parent=parent)
            sequence.table.publish(index, sequence.hashes[index])
            sequence.published_block_count = index + 1

    def _next_token(self, sequence: Sequence) -> int:
        early = self.rule.too_early(
            sequence.answered_before + sequence.output_token_count,
            min_token_count=sequence.stop.min_token_count,
            stop_token_ids=sequence.stop.stop_token_ids,
        )
        return self.rule.next_token(sequence.content, len(sequence.token_ids), early)

    def _sample(self, sequence: Sequence, now: float) -> None:
        token_id = self._next_token(sequence)
        sequence.token_ids.append(token_id)
        if sequence.top_logprob_count is not None:
            sequence.logprobs.append(self.rule.logprobs(sequence.content, token_id, sequence.top_logprob_count))
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        sequence.finish = self.rule.finish_of(
            token_id,
            sequence.output_token_count,
            len(sequence.token_ids),
            max_token_count=sequence.stop.max_token_count,
            stop_token_ids=sequence.stop.stop_token_ids,
            ignore_eos=sequence.stop.ignore_eos,
            max_context_token_count=self.max_context_token_count,
        )
        if sequence.finish is not None or sequence.is_prefill:
            self._running.remove(sequence)
            sequence.state = State.DONE
            if not (sequence.keeps_kv and sequence.finish is None):
                assert sequence.table is not None
                sequence.table.free()
