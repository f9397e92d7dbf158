"""A job's sampling parameters and structure in vLLM's words, and vLLM's log probabilities in ours.

Owns the mapping; starts nothing, waits for nothing. vLLM is imported inside the functions, because its variables must
be in force before it is (``engine/environment.py``).
"""

from __future__ import annotations

from typing import Any

from baton.leg import PromptLogprobs
from baton.request import Structure, StructureKind, TokenLogprobs
from engine.protocol import DecodeJob, PrefillJob
from kvtransfer.emitted_tokens import extra_args


def sampling_params(job: PrefillJob | DecodeJob, max_token_count: int, transfer: dict[str, Any] | None) -> Any:
    """To vllm, the answer is all of it: what was emitted already counts towards its lengths."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling, stop = job.sampling, job.stop
    answer_token_count = job.output_token_count + max_token_count
    params = SamplingParams(
        max_tokens=answer_token_count,
        min_tokens=min(stop.min_token_count, answer_token_count),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        allowed_token_ids=list(sampling.allowed_token_ids) or None,
        structured_outputs=None if sampling.structure is None else _structured_outputs(sampling.structure),
        logprobs=job.top_logprob_count,
        prompt_logprobs=job.prompt_logprob_count if isinstance(job, PrefillJob) else None,
        flat_logprobs=isinstance(job, PrefillJob) and job.prompt_logprob_count is not None,
        stop_token_ids=list(stop.stop_token_ids),
        ignore_eos=stop.ignore_eos,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=extra_args(job.prompt_token_ids[len(job.prompt_token_ids) - job.output_token_count :], transfer),
        skip_clone=True,  # made for this one request
    )
    if sampling.bad_token_sequences:
        # vLLM takes words and tokenises them, each in two spellings; what its sampler reads are these.
        params._bad_words_token_ids = [list(each) for each in sampling.bad_token_sequences]
    return params


def _structured_outputs(structure: Structure) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    match structure.kind:
        case StructureKind.JSON_SCHEMA:
            return StructuredOutputsParams(json=structure.text)
        case StructureKind.JSON_OBJECT:
            return StructuredOutputsParams(json_object=True)
        case StructureKind.REGEX:
            return StructuredOutputsParams(regex=structure.text)
        case StructureKind.CHOICE:
            return StructuredOutputsParams(choice=list(structure.choices))
        case StructureKind.GRAMMAR:
            return StructuredOutputsParams(grammar=structure.text)


def can_be_read(structure: Structure) -> bool:
    """Whether the engine's grammar compiler can read it. What it says of the reasons quotes the text: it is dropped.

    Only what vLLM raises for a bad structure says that it is one; anything else is a fault of ours or the library's,
    which the caller must not be blamed for.
    """
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError
    from vllm.v1.structured_output.backend_guidance import validate_guidance_grammar

    try:
        validate_guidance_grammar(SamplingParams(structured_outputs=_structured_outputs(structure)))
    except (VLLMClientError, ValueError):
        return False
    return True


def token_logprobs(job: PrefillJob | DecodeJob, completion: Any) -> tuple[TokenLogprobs, ...]:
    """Of the tokens of this output; vLLM's are one mapping a token, of the drawn one and the likeliest."""
    count = job.top_logprob_count
    if count is None:
        return ()
    told = []
    for token_id, candidates in zip(completion.token_ids, completion.logprobs, strict=True):
        drawn = candidates[token_id]
        likeliest = sorted((each.rank, other_id, each.logprob) for other_id, each in candidates.items())
        top = tuple((other_id, logprob) for rank, other_id, logprob in likeliest if rank <= count)
        told.append(TokenLogprobs(drawn.logprob, drawn.rank, top))
    return tuple(told)


def prompt_logprobs(job: PrefillJob, told: Any) -> PromptLogprobs | None:
    """Of the prompt's tokens. ``told``: vLLM's flat lists, in which each token but the first has itself and then its
    likeliest. Taken in strides: a long prompt has hundreds of thousands of entries, and streams wait meanwhile.

    Raises ``ValueError`` where they are not so."""
    count = job.prompt_logprob_count
    if count is None or not told:
        return None
    stride = 1 + count
    if len(told.token_ids) != (len(told) - 1) * stride:
        raise ValueError("vLLM's logprobs of a prompt are not one and its likeliest for each token but the first")
    own = slice(None, None, stride)
    likeliest, likeliest_logprobs = list(told.token_ids), list(told.logprobs)
    del likeliest[own], likeliest_logprobs[own]
    logprobs = PromptLogprobs(count)
    logprobs.append_first()
    logprobs.extend(told.logprobs[own], told.ranks[own], likeliest, likeliest_logprobs)
    return logprobs
