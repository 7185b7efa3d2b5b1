"""The server process: life cycle, addresses, health and metrics endpoints, and servers embedded in other programs.

The top layer: it may import every other package.
"""
