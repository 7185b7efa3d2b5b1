"""Connections to servers: channels, credentials, retries, and how arrays travel, by message or shared memory.

May import `results` and everything below.
"""
