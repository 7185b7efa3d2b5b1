"""The Open Inference Protocol: `inference.GRPCInferenceService`, as clients of Triton and KServe call it.

`requests` translates a ModelInferRequest to an `AttributeRequest`, `rpc.request_handler` validates and explains it, and
`responses` encodes the answer. Nothing about admission, deadlines, telemetry or the drain is written here.
"""
