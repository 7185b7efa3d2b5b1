"""Conversion between protobuf messages and domain objects, with validation of all that callers send.

May import `engine` and everything below, and protobuf; never gRPC.
"""
