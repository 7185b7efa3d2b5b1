"""Scheduling of a stream: which part is sent next and to which server, and which parts are sent again.

Needs only the standard library and `_transport.balancing`: no threads, no lock and no clock, so that
`benchmarks.simulation` runs it on a virtual clock.
"""
