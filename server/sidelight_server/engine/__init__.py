"""The engine: prepares, schedules and runs requests on devices, and holds the model registry.

May import `models` and everything below; neither gRPC nor protobuf. `scheduler` needs the standard library alone.
"""
