"""Nothing of the public API is without a test: the descriptors beside what the conformance tests say they show."""

from __future__ import annotations

from field_register import Register, request_fields, response_fields
from test_conformance_answers import register as answers
from test_conformance_fields import register as fields
from test_conformance_times import register as times
from test_conformance_tools import register as tools
from test_conformance_watch import register as watch


def joined(*registers: Register) -> Register:
    whole = Register()
    for each in registers:
        for field, tests in each.tests.items():
            for test in tests:
                whole.add(field, test)
    return whole


def test_every_field_of_every_request_and_response_is_shown_by_a_test_and_no_other() -> None:
    missing, unknown = joined(fields, answers, tools, times, watch).compare(request_fields() | response_fields())
    assert missing == []
    assert unknown == []


def test_a_new_field_and_a_wrong_name_would_be_noticed() -> None:
    whole = joined(fields, answers, tools, times, watch)
    del whole.tests["Sampling.min_p"]
    whole.add("Sampling.max_p", "a test")
    assert whole.compare(request_fields() | response_fields()) == (["Sampling.min_p"], ["Sampling.max_p"])
    assert {"GenerateRequest.text", "TokenIds.ids", "ToolChoice.mode"} <= request_fields()
    assert {"TopLogprob.logprob", "PhaseTimings.kv_verify", "SpecialToken.text"} <= response_fields()
