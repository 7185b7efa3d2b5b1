"""Streaming calls: a stream, its batches, and the writer of its answers.

May import what `rpc` may and the other modules of `rpc`, except `servicers` and `open_calls`.
"""
