"""Server reflection, as v1 for newer clients and v1alpha for older ones."""

from collections.abc import Callable, Iterable
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha import reflection, reflection_pb2

from ..interop.open_inference import inference_pb2

V1 = "grpc.reflection.v1.ServerReflection"


def enable_reflection(server: grpc.aio.Server, services: Iterable[str]) -> None:
    """Enable reflection for `services`.

    grpcio-reflection only has v1alpha. The messages of v1 are the same on the wire, so its servicer also serves v1. v1
    is not listed, because its schema is not in the descriptor pool: a client that looks up every listed service would
    fail.
    """
    names, pool = (*services, reflection.SERVICE_NAME), _Pools()
    reflection.enable_server_reflection(names, server, pool)
    servicer = reflection.aio.ReflectionServicer(service_names=names, pool=pool)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(V1, {"ServerReflectionInfo": handler}),))


class _Pools:
    """The default descriptor pool, and the one of the Open Inference Protocol."""

    def __init__(self) -> None:
        self._pools = (descriptor_pool.Default(), inference_pb2.DESCRIPTOR.pool)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Return a look-up that tries each pool in turn. It raises the `KeyError` of the last one."""

        def find(*arguments: Any) -> Any:
            first, last = (getattr(pool, name) for pool in self._pools)
            try:
                return first(*arguments)
            except KeyError:
                return last(*arguments)

        return find
