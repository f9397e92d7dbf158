"""What prefill and decode orders share on the wire. Protobuf stops in the services that use this."""

from __future__ import annotations

from typing import Any

from baton.errors import FieldViolation, invalid_request
from baton.leg import unpack_token_ids
from baton.request import EngineStop, LegFinish, Sampling
from baton.worker.v1 import worker_pb2

FINISH_TO_PROTO = {
    None: worker_pb2.LEG_FINISH_UNSPECIFIED,
    LegFinish.STOP: worker_pb2.LEG_FINISH_STOP,
    LegFinish.LENGTH: worker_pb2.LEG_FINISH_LENGTH,
}


def order_parts(request: Any) -> tuple[tuple[int, ...], Sampling, EngineStop]:
    """Prompt, sampling and stop of a PrefillRequest or DecodeRequest.

    Raises INVALID_REQUEST when a part is missing: on this API nothing has a default.
    """
    missing = [
        FieldViolation(name, "is missing; every default must be filled in")
        for name in ("sampling", "stop")
        if not request.HasField(name)
    ]
    try:
        prompt_token_ids = unpack_token_ids(request.prompt_token_ids)
    except ValueError as error:
        missing.append(FieldViolation("prompt_token_ids", str(error)))
    if missing:
        raise invalid_request(missing)
    sampling = Sampling(
        temperature=request.sampling.temperature,
        top_p=request.sampling.top_p,
        top_k=request.sampling.top_k,
        min_p=request.sampling.min_p,
        seed=request.sampling.seed if request.sampling.HasField("seed") else None,
    )
    stop = EngineStop(
        max_token_count=request.stop.max_token_count,
        stop_token_ids=tuple(request.stop.stop_token_ids),
        ignore_eos=request.stop.ignore_eos,
    )
    return prompt_token_ids, sampling, stop
