"""The engine: it prepares, schedules and runs requests on devices, and keeps the registry of models.

May import `models` and everything below; neither gRPC nor protobuf. `scheduler` needs the standard library alone.
"""
