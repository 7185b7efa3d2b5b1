"""The trial of a model: its first runs, which detect how it is called, what it returns and which layers it has.

May import `models.row_memory`, compute and below.
"""
