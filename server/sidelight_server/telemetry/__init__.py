"""What is recorded of each request: the call record, counters, traces and logs.

May import `domain`, `methods`, `inputs` and `errors`. Whoever counts is never blocked by whoever reads.
"""
