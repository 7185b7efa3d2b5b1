"""Tensor computation: the kernel, the replica of a module that it runs, and the reduction of gradients to maps.

May import `config`, `telemetry`, `domain`, `methods`, `inputs` and `errors`. Works on one module and its rows, without
requests.
"""
