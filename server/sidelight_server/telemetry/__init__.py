"""Telemetry of requests: call records, counters, traces and logs.

May import `domain`, `methods`, `inputs` and `errors`. Counting is never blocked by a scrape.
"""
