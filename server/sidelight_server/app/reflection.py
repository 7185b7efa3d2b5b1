"""Server reflection, as v1 for newer clients and v1alpha for older ones."""

from collections.abc import Iterable

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

V1 = "grpc.reflection.v1.ServerReflection"


def enable_reflection(server: grpc.aio.Server, services: Iterable[str]) -> None:
    """Enable reflection for `services`.

    grpcio-reflection only has v1alpha. The messages of v1 are the same on the wire, so its servicer also serves v1. v1
    is not listed, because its schema is not in the descriptor pool: a client that looks up every listed service would
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
