"""Servers of tests: in a thread, in a process, or following a script; a proxy before one, and its counters."""
