"""The replica of a module, and the fusion of its BatchNorms.

May import `passes` and what `compute` may.
"""
