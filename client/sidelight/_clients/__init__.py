"""The clients: `Client`, `AsyncClient`, and what they share; `replay`, which uses one.

May import `_streaming` and everything below.
"""
