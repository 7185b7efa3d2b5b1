"""The models of an engine: loading at start, on the first request and on reload, and measuring again.

May import `engine.devices`, models and below.
"""
