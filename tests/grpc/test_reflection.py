"""What grpcurl does, with nothing of Baton's own code: list, describe and call, from what reflection tells alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict, ParseDict
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from sim_cluster import sim_cluster


class Reflected:
    """A caller that knows an address and no .proto file. Blocking: for a thread of its own."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None = None) -> None:
        options = [("grpc.enable_http_proxy", 0)]
        if credentials is None:
            self._channel = grpc.insecure_channel(address, options=options)
        else:
            self._channel = grpc.secure_channel(address, credentials, options=options)
        self._database = ProtoReflectionDescriptorDatabase(self._channel)
        self._pool = DescriptorPool(self._database)  # of its own: the default one knows our generated code

    def services(self) -> list[str]:
        return sorted(self._database.get_services())

    def describe(self, service: str) -> dict[str, tuple[str, str, bool]]:
        """Method to (message in, message out, whether it streams)."""
        found = self._pool.FindServiceByName(service)
        return {
            method.name: (method.input_type.full_name, method.output_type.full_name, method.server_streaming)
            for method in found.methods
        }

    def fields(self, message: str) -> dict[str, int]:
        return {field.name: field.number for field in self._pool.FindMessageTypeByName(message).fields}

    def call(self, service: str, method: str, request: dict[str, Any]) -> list[dict[str, Any]]:
        """Every message that came back, as JSON."""
        found: MethodDescriptor = self._pool.FindServiceByName(service).methods_by_name[method]
        into, out = (message_factory.GetMessageClass(each) for each in (found.input_type, found.output_type))
        make = self._channel.unary_stream if found.server_streaming else self._channel.unary_unary
        run: Any = make(
            f"/{service}/{method}", request_serializer=into.SerializeToString, response_deserializer=out.FromString
        )
        reply = run(ParseDict(request, into()), timeout=60)
        messages = list(reply) if found.server_streaming else [reply]
        return [MessageToDict(each, preserving_proto_field_name=True) for each in messages]

    def close(self) -> None:
        self._channel.close()


async def test_reflection_lists_describes_and_calls_the_public_api(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster:

        def grpcurl() -> tuple[list[str], Any, Any, Any, Any, Any]:
            caller = Reflected(cluster.endpoint.address)
            try:
                return (
                    caller.services(),
                    caller.describe("baton.v1.GenerationService"),
                    caller.fields("baton.v1.GenerateRequest"),
                    caller.call("baton.v1.ModelService", "ListModels", {}),
                    caller.call(
                        "baton.v1.GenerationService",
                        "Generate",
                        {
                            "chat": {"messages": [{"role": "user", "content": "hi"}]},
                            "stop": {"max_output_token_count": 5},
                            "output": {"content": "CONTENT_BOTH"},
                        },
                    ),
                    caller.call("baton.v1.ModelService", "CountTokens", {"text": "hi there"}),
                )
            finally:
                caller.close()

        services, methods, fields, models, events, count = await asyncio.to_thread(grpcurl)
        assert services == [
            "baton.v1.GenerationService",
            "baton.v1.ModelService",
            "baton.v1.StatusService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        ]
        assert methods["Generate"] == ("baton.v1.GenerateRequest", "baton.v1.GenerateResponse", True)
        assert methods["CancelGeneration"][2] is False
        assert (fields["model"], fields["chat"], fields["resume"]) == (1, 4, 13)
        assert models[0]["models"][0]["name"] == "tiny"
        assert count[0]["token_count"] >= 1
        assert ["started" in events[0], "finished" in events[-1]] == [True, True]
        chunks = [event["chunk"] for event in events[1:-1]]
        assert sum(chunk.get("token_count", 0) for chunk in chunks) == 5
        assert sum(len(chunk.get("token_ids", ())) for chunk in chunks) == 5
        assert events[-1]["finished"]["reason"] == "FINISH_REASON_MAX_OUTPUT_TOKENS"


async def test_no_reflection_where_the_configuration_turns_it_off(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path, enable_reflection=False) as cluster:

        def services() -> None:
            caller = Reflected(cluster.endpoint.address)
            try:
                caller.services()
            finally:
                caller.close()

        with pytest.raises(grpc.RpcError) as refused:
            await asyncio.to_thread(services)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
