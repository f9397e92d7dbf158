"""The grammar of a stream, over all of its attachments. Pure."""

from __future__ import annotations

from baton.errors import BatonError, StatusName, internal
from baton.events import Chunk, Event, Finished, PromptPart, Started


class StreamGrammar:
    """Checks ``Started PromptPart* Chunk* Finished`` and that no token of a sample is missing or repeated, also where
    the stream was cut and attached again. Raises INTERNAL."""

    def __init__(self, sample_count: int = 1) -> None:
        self._is_started = self._is_finished = False
        self._has_chunks = False
        self._token_counts = [0] * sample_count
        self._expected = [0] * sample_count
        self._ended_tokenless = [False] * sample_count

    @property
    def is_started(self) -> bool:
        return self._is_started

    @property
    def is_finished(self) -> bool:
        return self._is_finished

    @property
    def token_count(self) -> int:
        """Tokens so far, of all samples."""
        return sum(self._token_counts)

    @property
    def next_token_indices(self) -> tuple[int, ...]:
        """Of each sample, what a resumed stream begins with: the index of the first token that is not here, plus one
        where the text held back to the answer's end came, too."""
        return tuple(
            count + is_tokenless
            for count, is_tokenless in zip(self._token_counts, self._ended_tokenless, strict=True)
        )

    def attach_again(self) -> None:
        """The stream was cut; another one goes on with it, and begins with its own ``Started``."""
        self._is_started = False
        self._expected = list(self.next_token_indices)

    def check(self, event: Event) -> None:
        if self._is_finished or self._is_started == isinstance(event, Started):
            raise internal(f"the server sent {type(event).__name__} out of order")
        match event:
            case Started():
                self._is_started = True
            case PromptPart():
                if self._has_chunks:
                    raise internal("the server sent a part of the prompt after the answer had begun")
            case Chunk():
                self._check_chunk(event)
            case Finished():
                self._is_finished = True

    def _check_chunk(self, chunk: Chunk) -> None:
        sample = chunk.sample_index
        if not 0 <= sample < len(self._expected):
            raise internal(f"sample {sample} came, and {len(self._expected)} were asked for")
        expected = self._expected[sample]
        if chunk.first_token_index != expected:
            raise internal(f"token {expected} was expected and {chunk.first_token_index} came")
        if chunk.logprobs and len(chunk.logprobs) != chunk.token_count:
            raise internal(f"{len(chunk.logprobs)} logprobs came with {chunk.token_count} tokens")
        self._has_chunks = True
        self._token_counts[sample] += chunk.token_count
        self._expected[sample] += chunk.token_count
        self._ended_tokenless[sample] = chunk.token_count == 0

    def broken(self, error: BatonError) -> BatonError:
        """The error that ends this stream. One that may be retried says that nothing was sent, so after tokens came
        (a lost connection; a router too full to go on with them) it is ABORTED: a retry would repeat them."""
        if not error.is_retryable or self.token_count == 0:
            return error
        metadata = {**error.metadata, "emitted_token_count": str(self.token_count)}
        message = f"{error.message}, after {self.token_count} tokens; start over"
        return BatonError(error.reason, StatusName.ABORTED, message, metadata=metadata)

    def check_end(self) -> None:
        if not self._is_finished:
            raise internal("the server ended the stream with OK but without Finished")
