"""Models: where a module comes from, what is found out and measured when it is loaded.

May import `compute` and everything below; neither gRPC nor protobuf.
"""
