"""Inputs: validate images, targets, tensors and enums, and convert them to messages.

May import `visualization`, `exceptions` and `v1`.
"""
