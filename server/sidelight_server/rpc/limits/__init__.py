"""Limits of what a caller may take: permits, receive slots, messages that are read, and the time to accept an answer.

May import `errors` and `rpc.status`.
"""
