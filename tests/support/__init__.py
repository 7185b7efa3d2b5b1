"""Shared code of the tests: models, servers, processes, messages, and ways to wait. A test module imports no other."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]  # on the path of a server's process, it finds `python:support.models.…`
ROOT = TESTS.parent
