"""The gRPC services: admit and read each call, hand it to the engine, write the response, set the status.

May import `security`, `wire`, `engine` and everything below; never `app`.
"""
