"""TLS, authorization, and the limit on streams for each peer.

May import `wire`, `engine` and everything below. `authorization` also imports `rpc.status`, to refuse a call.
"""
