"""How a module is run forward and backward: its call, precision, CUDA graphs, and hooks at layers.

May import what `compute` may.
"""
