"""The clients: `Client`, `AsyncClient` and their shared core; `replay`, which uses a client.

May import `_streaming` and everything below.
"""
