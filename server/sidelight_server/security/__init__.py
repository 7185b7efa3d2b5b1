"""TLS, authorization, and the limit on open streams per peer.

May import `wire`, `engine` and everything below. `authorization` also imports `rpc.status`, to reject a call.
"""
