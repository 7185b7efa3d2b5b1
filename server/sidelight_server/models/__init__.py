"""Models: loads modules from sources, detects how to call them, and calibrates their chunk size.

May import `compute` and everything below; neither gRPC nor protobuf.
"""
