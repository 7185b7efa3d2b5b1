"""How a model's outputs are interpreted: classes, probabilities, the score of each row's target, and its gradient.

May import what `compute` may.
"""
