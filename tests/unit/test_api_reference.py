"""The reference of the API is made from comments, which say of every element what it means."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto

from deploy.setup import api_reference
from deploy.setup.console import StepFailed

NUMBERS = (
    FieldDescriptorProto.TYPE_INT32,
    FieldDescriptorProto.TYPE_INT64,
    FieldDescriptorProto.TYPE_DOUBLE,
)
SAYS_WHEN_ABSENT = re.compile(
    r"\b(default|absent|required|optional|empty|0 (keeps|counts|if)|unspecified|at least one|exactly one|at least 1"
    r"|otherwise|1 to|only with)\b",
    re.I,
)
SAYS_UNIT_OR_RANGE = re.compile(
    r"\d|\b(token|tokens|bytes|index|id|ids|count|attempts|workers|attempted|tried|regions)\b", re.I
)


@pytest.fixture(scope="module")
def fields() -> dict[str, tuple[FieldDescriptorProto, str]]:
    """Every field of the public API by its full name, with its comment."""
    found: dict[str, tuple[FieldDescriptorProto, str]] = {}
    for file in api_reference.descriptors():
        comments = api_reference.Comments(file)

        def walk(
            message: DescriptorProto, path: tuple[int, ...], name: str, comments: api_reference.Comments
        ) -> Iterator[tuple[str, FieldDescriptorProto, str]]:
            for index, field in enumerate(message.field):
                yield f"{name}.{field.name}", field, comments.of(*path, 2, index)
            for index, nested in enumerate(message.nested_type):
                yield from walk(nested, (*path, 3, index), f"{name}.{nested.name}", comments)

        for index, message in enumerate(file.message_type):
            for name, field, comment in walk(message, (4, index), message.name, comments):
                found[name] = field, comment
    return found


def asked(fields: dict[str, tuple[FieldDescriptorProto, str]]) -> set[str]:
    """The messages that a caller sends: what a request is, or has in it."""
    messages = {name.split(".")[0] for name in fields if name.split(".")[0].endswith("Request")}
    while True:
        inner = {
            field.type_name.rsplit(".", 1)[-1]
            for name, (field, _) in fields.items()
            if name.split(".")[0] in messages and field.type == FieldDescriptorProto.TYPE_MESSAGE
        }
        if inner <= messages:
            return messages
        messages |= inner


def test_the_committed_reference_is_what_the_comments_say() -> None:
    made = api_reference.page(api_reference.descriptors())
    assert (api_reference.ROOT / api_reference.PAGE).read_text(encoding="utf-8") == made, "run make proto"


def test_every_field_that_a_caller_sends_says_what_its_absence_means(
    fields: dict[str, tuple[FieldDescriptorProto, str]],
) -> None:
    sent = asked(fields)
    assert {"GenerateRequest", "Sampling", "ToolChoice", "Continuation", "DetokenizeRequest"} <= sent
    silent = [
        name
        for name, (field, comment) in fields.items()
        if name.split(".")[0] in sent
        and not SAYS_WHEN_ABSENT.search(comment)
        and not (field.HasField("oneof_index") and not field.proto3_optional)  # the oneof says it for its members
    ]
    assert silent == []


def test_every_number_says_its_unit_or_its_range(fields: dict[str, tuple[FieldDescriptorProto, str]]) -> None:
    silent = [
        name
        for name, (field, comment) in fields.items()
        if field.type in NUMBERS and not SAYS_UNIT_OR_RANGE.search(f"{comment}")
    ]
    assert silent == []


def test_the_page_names_every_element_and_links_lead_somewhere(
    fields: dict[str, tuple[FieldDescriptorProto, str]],
) -> None:
    page = api_reference.page(api_reference.descriptors())
    assert all(f"`{field.name}` ({field.number})" in page for field, _ in fields.values())
    headings = {line.lstrip("# ").lower().replace(".", "") for line in page.splitlines() if line.startswith("#")}
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= headings
    assert "Reserved: 4, `prompt`." in page
    assert "| one of *prompt* | | The prompt." in page


def test_a_changed_comment_changes_the_page(tmp_path: Path) -> None:
    shutil.copytree(api_reference.PROTO, tmp_path / "proto")
    path = tmp_path / "proto" / "baton" / "v1" / "model.proto"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("// Required.\n", "// Text | chat.\n"), encoding="utf-8")
    page = api_reference.page(api_reference.descriptors(tmp_path / "proto"))
    assert page != api_reference.page(api_reference.descriptors())
    assert "Text \\| chat." in page
    path.write_text("message {", encoding="utf-8")
    with pytest.raises(StepFailed, match=r"model\.proto"):
        api_reference.descriptors(tmp_path / "proto")
