"""Conversion between protobuf messages and domain objects, and validation of everything that callers send.

May import `engine` and everything below, and protobuf; never gRPC.
"""
