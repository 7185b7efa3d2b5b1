"""Devices: the thread of each device, the chunk that runs on it, and what happens if it fails.

May import what `engine` may and the other modules of `engine`, except `engine.engine`, `registry` and `preparation`.
"""
