"""What the router's client writes, the workers' services read: every word of an order, and every word back."""

from __future__ import annotations

from typing import Any

import pytest

from baton.errors import BatonError
from baton.leg import DecodeDone, DecodeEvent, DecodeOrder, KvAdopted, PrefillOrder, RecomputeReason, Stepped
from baton.request import EngineStop, LegFinish, Sampling, Structure, StructureKind, TokenLogprobs
from decode_worker import leg_messages_proto
from prefill_worker import service as prefill_service
from router.leg_messages_client import decode_request, events_from_proto, prefill_request

SAMPLING = Sampling(
    temperature=0.7,
    top_p=0.9,
    top_k=40,
    min_p=0.05,
    seed=0,
    presence_penalty=-1.5,
    frequency_penalty=0.25,
    repetition_penalty=1.1,
    logit_bias=((5, -100.0), (7, 0.5)),
    allowed_token_ids=(1, 2, 3),
    bad_token_sequences=((9,), (8, 7)),
)
STOP = EngineStop(9, stop_token_ids=(4, 5), ignore_eos=True, min_token_count=3)
STRUCTURES = [
    None,
    Structure(StructureKind.JSON_OBJECT),
    Structure(StructureKind.JSON_SCHEMA, "{}"),
    Structure(StructureKind.REGEX, "a"),
    Structure(StructureKind.GRAMMAR, "root ::= x"),
    Structure(StructureKind.CHOICE, choices=("a", "b")),
]
LOGPROBS = (TokenLogprobs(-0.5, 1, ((3, -0.5), (4, -1.25))), TokenLogprobs(-9.0, 77))
EVENTS: list[DecodeEvent] = [
    Stepped((3, 6), LOGPROBS),
    Stepped((3,)),
    DecodeDone(LegFinish.STOP),
    *(
        KvAdopted(
            1, 2, 3, 4, 5, 6, 7, 8, 9, recompute_reason=reason, pull_count=2, post_s=0.5, wire_s=0.25, verify_s=1
        )
        for reason in (None, *RecomputeReason)
    ),
]


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize("top_logprob_count", [None, 0, 5])
def test_an_order_crosses_the_wire_whole(structure: Structure | None, top_logprob_count: int | None) -> None:
    values = {name: getattr(SAMPLING, name) for name in SAMPLING.__dataclass_fields__}
    sampling = Sampling(**{**values, "structure": structure})
    prefill = PrefillOrder("leg", (1, 2, 3), sampling, STOP, 2.5, 1, 2, top_logprob_count, "t")
    assert prefill_service.order_from_proto(_sent(prefill_request(prefill))) == prefill
    decode = DecodeOrder("leg", (1, 2, 3), sampling, STOP, b"ticket", 1, 2, top_logprob_count, "t")
    assert leg_messages_proto.order_from_proto(_sent(decode_request(decode))) == decode


def test_the_defaults_cross_the_wire_too() -> None:
    order = DecodeOrder("leg", (1,), Sampling(), EngineStop(1))
    assert leg_messages_proto.order_from_proto(_sent(decode_request(order))) == order


@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_an_event_crosses_the_wire_whole(event: DecodeEvent) -> None:
    assert events_from_proto(_sent(leg_messages_proto.events_to_proto(event))) == [event]


def test_what_is_told_together_is_heard_in_the_order_it_happened_in() -> None:
    adopted = KvAdopted(1, 2, 3, 4, 5, 6, 7, 8, recompute_reason=RecomputeReason.STALE, is_with_tokens=True)
    together: list[DecodeEvent] = [adopted, Stepped((3, 6), LOGPROBS), DecodeDone(LegFinish.STOP)]
    assert events_from_proto(_sent(leg_messages_proto.events_to_proto(*together))) == together


def test_a_message_of_a_decode_without_an_event_is_refused() -> None:
    with pytest.raises(BatonError):
        events_from_proto(leg_messages_proto.events_to_proto())


def test_a_structure_of_an_unknown_kind_is_refused() -> None:
    request: Any = decode_request(DecodeOrder("leg", (1,), Sampling(structure=STRUCTURES[1]), EngineStop(1)))
    request.sampling.structure.kind = 99
    with pytest.raises(BatonError, match="structure"):
        leg_messages_proto.order_from_proto(request)


def _sent(message: Any) -> Any:
    return type(message).FromString(message.SerializeToString())
