"""Writes the reference of the public API, ``docs/api/reference.md``, from the comments of its .proto files.

``make proto`` writes it beside the generated code (``stubs.py``); ``tests/unit/test_api_reference.py`` compares what
is committed with what this makes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

from deploy.setup.console import StepFailed

ROOT = Path(__file__).resolve().parents[2]
PROTO = ROOT / "proto"
PAGE = Path("docs") / "api" / "reference.md"
"""Below the root."""
PUBLIC = "baton/v1"
FIRST = ("baton/v1/generation.proto", "baton/v1/model.proto")
"""In this order; the others follow by name."""
HEAD = """\
# Reference of `baton.v1`

Every call, message and field of the public API: what it means, in what unit and range, and what holds when it is
absent. Made from the comments in `proto/baton/v1` by `make proto`; correct it there. Numbers in brackets are what
goes over the wire, and stay. A field of type `optional T` tells absent from zero; every other number, text or flag
that is absent is zero, empty or false.
"""


def descriptors(proto: Path | None = None) -> list[FileDescriptorProto]:
    """The public files with their comments, in the order of the page. Raises ``StepFailed``."""
    proto = PROTO if proto is None else proto
    sources = sorted(str(path.relative_to(proto)) for path in (proto / PUBLIC).glob("*.proto"))
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "api.binpb"
        command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={proto}", "--include_source_info"]
        done = subprocess.run(  # noqa: S603 - our own arguments, no shell
            [*command, f"--descriptor_set_out={out}", *sources], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise StepFailed(f"protoc refused: {done.stderr.strip()[-2000:]}", "correct the .proto file it names")
        files = list(FileDescriptorSet.FromString(out.read_bytes()).file)
    return sorted(files, key=lambda file: (FIRST.index(file.name) if file.name in FIRST else len(FIRST), file.name))


class Comments:
    """What is written above each element of one file."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._by_path = {
            tuple(location.path): location.leading_comments for location in file.source_code_info.location
        }
        self._above = next((loc for loc in file.source_code_info.location if list(loc.path) == [12]), None)

    def of_file(self) -> str:
        """Above the ``syntax`` line."""
        return "" if self._above is None else _clean(self._above.leading_comments)

    def of(self, *path: int) -> str:
        return _clean(self._by_path.get(path, ""))


def _clean(comment: str) -> str:
    return "\n".join(line.removeprefix(" ").rstrip() for line in comment.strip("\n").splitlines()).strip()


def page(files: Sequence[FileDescriptorProto]) -> str:
    """The whole page."""
    lines = [HEAD]
    for file in files:
        comments = Comments(file)
        lines += [f"# `proto/{file.name}`\n", f"{comments.of_file()}\n"]
        for index, service in enumerate(file.service):
            lines += _service(service, comments, (6, index))
        for index, message in enumerate(file.message_type):
            lines += _message(message, comments, (4, index), "")
        for index, enum in enumerate(file.enum_type):
            lines += _enum(enum, comments, (5, index), "")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _service(service: ServiceDescriptorProto, comments: Comments, path: tuple[int, ...]) -> Iterator[str]:
    yield f"## {service.name}\n"
    yield f"{comments.of(*path)}\n"
    for index, method in enumerate(service.method):
        streams = "stream of " if method.server_streaming else ""
        yield f"### {service.name}.{method.name}\n"
        yield f"{_link(method.input_type)} → {streams}{_link(method.output_type)}\n"
        yield f"{comments.of(*path, 2, index)}\n"


def _message(message: DescriptorProto, comments: Comments, path: tuple[int, ...], outer: str) -> Iterator[str]:
    name = f"{outer}{message.name}"
    yield f"## {name}\n"
    yield f"{comments.of(*path)}\n"
    if message.field:
        yield "| field | type | meaning |\n|---|---|---|"
        said: set[int] = set()
        for index, field in enumerate(message.field):
            in_oneof = field.HasField("oneof_index") and not field.proto3_optional
            if in_oneof and field.oneof_index not in said:
                said.add(field.oneof_index)
                group = message.oneof_decl[field.oneof_index].name
                yield f"| one of *{group}* | | {_cell(comments.of(*path, 8, field.oneof_index))} |"
            indent = "· " if in_oneof else ""
            meaning = _cell(comments.of(*path, 2, index))
            yield f"| {indent}`{field.name}` ({field.number}) | {_type(field)} | {meaning} |"
        yield ""
    reserved = [str(one.start) for one in message.reserved_range] + [f"`{text}`" for text in message.reserved_name]
    if reserved:
        yield f"Reserved: {', '.join(reserved)}.\n"
    for index, nested in enumerate(message.nested_type):
        yield from _message(nested, comments, (*path, 3, index), f"{name}.")
    for index, enum in enumerate(message.enum_type):
        yield from _enum(enum, comments, (*path, 4, index), f"{name}.")


def _enum(enum: EnumDescriptorProto, comments: Comments, path: tuple[int, ...], outer: str) -> Iterator[str]:
    yield f"## {outer}{enum.name}\n"
    yield f"{comments.of(*path)}\n"
    yield "| value | meaning |\n|---|---|"
    for index, value in enumerate(enum.value):
        yield f"| `{value.name}` ({value.number}) | {_cell(comments.of(*path, 2, index))} |"
    yield ""


def _type(field: FieldDescriptorProto) -> str:
    if field.type_name:
        said = _link(field.type_name)
    else:
        said = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {said}"
    return f"optional {said}" if field.proto3_optional else said


def _link(type_name: str) -> str:
    if not type_name.startswith(".baton.v1."):
        return type_name.removeprefix(".google.protobuf.")
    name = type_name.removeprefix(".baton.v1.")
    return f"[{name}](#{name.lower().replace('.', '')})"


def _cell(comment: str) -> str:
    return " ".join(comment.split()).replace("|", "\\|")


def write(root: Path) -> Path:
    """Writes the page below ``root``; returns its path there. Raises ``StepFailed``."""
    (root / PAGE).parent.mkdir(parents=True, exist_ok=True)
    (root / PAGE).write_text(page(descriptors()), encoding="utf-8")
    return PAGE
