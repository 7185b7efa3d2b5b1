"""Protocols of other projects, served beside `sidelight.v1` on the same port. Each has a package of its own.

May import `rpc` and everything below; never `app`. Messages become those of `sidelight.v1` and take the path of `rpc`.
"""
