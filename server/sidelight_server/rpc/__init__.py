"""The gRPC services: read and admit each call, submit it to the engine, write the response, set the status.

May import `security`, `wire`, `engine` and everything below; never `app`.
"""
