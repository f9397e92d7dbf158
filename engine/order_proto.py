"""What prefill and decode orders share on the wire. Protobuf stops in the services that use this."""

from __future__ import annotations

from typing import Any

from baton.errors import FieldViolation, invalid_request
from baton.leg import unpack_token_ids
from baton.request import EngineStop, LegFinish, Sampling, Structure, StructureKind, TokenLogprobs
from baton.worker.v1 import worker_pb2

FINISH_TO_PROTO = {
    None: worker_pb2.LEG_FINISH_UNSPECIFIED,
    LegFinish.STOP: worker_pb2.LEG_FINISH_STOP,
    LegFinish.LENGTH: worker_pb2.LEG_FINISH_LENGTH,
}
_STRUCTURE_KINDS = {
    worker_pb2.STRUCTURE_KIND_JSON_SCHEMA: StructureKind.JSON_SCHEMA,
    worker_pb2.STRUCTURE_KIND_JSON_OBJECT: StructureKind.JSON_OBJECT,
    worker_pb2.STRUCTURE_KIND_REGEX: StructureKind.REGEX,
    worker_pb2.STRUCTURE_KIND_CHOICE: StructureKind.CHOICE,
    worker_pb2.STRUCTURE_KIND_GRAMMAR: StructureKind.GRAMMAR,
}


def order_fields(request: Any) -> dict[str, Any]:
    """What a PrefillRequest and a DecodeRequest have in common, by the names that both kinds of order give it.

    Raises INVALID_REQUEST when a part is missing: on this API nothing has a default. Ranges are the worker's to
    check.
    """
    wrong = [
        FieldViolation(name, "is missing; every default must be filled in")
        for name in ("sampling", "stop")
        if not request.HasField(name)
    ]
    prompt_token_ids: tuple[int, ...] = ()
    try:
        prompt_token_ids = unpack_token_ids(request.prompt_token_ids)
    except ValueError as error:
        wrong.append(FieldViolation("prompt_token_ids", str(error)))
    if request.sampling.HasField("structure") and request.sampling.structure.kind not in _STRUCTURE_KINDS:
        wrong.append(FieldViolation("sampling.structure", "is of a kind not known here"))
    if wrong:
        raise invalid_request(wrong)
    return {
        "leg_id": request.leg_id,
        "prompt_token_ids": prompt_token_ids,
        "sampling": _sampling(request.sampling),
        "stop": EngineStop(
            max_token_count=request.stop.max_token_count,
            stop_token_ids=tuple(request.stop.stop_token_ids),
            ignore_eos=request.stop.ignore_eos,
            min_token_count=request.stop.min_token_count,
        ),
        "priority": request.priority,
        "output_token_count": request.output_token_count,
        "top_logprob_count": request.top_logprob_count if request.HasField("top_logprob_count") else None,
        "tenant": request.tenant,
    }


def logprobs_to_proto(logprobs: TokenLogprobs) -> worker_pb2.DrawnLogprobs:
    return worker_pb2.DrawnLogprobs(
        logprob=logprobs.logprob,
        rank=logprobs.rank,
        top=[worker_pb2.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in logprobs.top],
    )


def _sampling(spec: Any) -> Sampling:
    structure = None
    if spec.HasField("structure"):
        kind = _STRUCTURE_KINDS[spec.structure.kind]
        structure = Structure(kind, spec.structure.text, tuple(spec.structure.choices))
    return Sampling(
        temperature=spec.temperature,
        top_p=spec.top_p,
        top_k=spec.top_k,
        min_p=spec.min_p,
        seed=spec.seed if spec.HasField("seed") else None,
        presence_penalty=spec.presence_penalty,
        frequency_penalty=spec.frequency_penalty,
        repetition_penalty=spec.repetition_penalty,
        logit_bias=tuple((each.token_id, each.bias) for each in spec.logit_bias),
        allowed_token_ids=tuple(spec.allowed_token_ids),
        bad_token_sequences=tuple(tuple(each.token_ids) for each in spec.bad_token_sequences),
        structure=structure,
    )
