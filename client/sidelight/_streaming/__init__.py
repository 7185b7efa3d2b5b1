"""Streams: many batches in flight to one or several servers, with retries.

May import `_transport` and everything below.
"""
