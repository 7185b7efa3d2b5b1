"""Shared code of the benchmarks: models, requests, a raw HTTP/2 client, and functions that measure."""
