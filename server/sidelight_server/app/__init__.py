"""The server process: its life cycle, addresses, health and metrics endpoints, and servers inside other programs.

The top layer: it may import every other package.
"""
