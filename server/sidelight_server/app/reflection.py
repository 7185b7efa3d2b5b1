"""Server reflection, in both versions of its service: newer clients ask for v1, older ones for v1alpha."""

from collections.abc import Iterable

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

V1 = "grpc.reflection.v1.ServerReflection"


def enable_reflection(server: grpc.aio.Server, services: Iterable[str]) -> None:
    """Let callers ask for the schema of `services`.

    grpcio-reflection has v1alpha alone. The messages of v1 are the same on the wire, so the same servicer answers both.
    v1 is not listed: its own schema is not in the descriptor pool, and a client that looks up all that is listed would
    fail.
    """
    names = (*services, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    servicer = reflection.aio.ReflectionServicer(service_names=names)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(V1, {"ServerReflectionInfo": handler}),))
