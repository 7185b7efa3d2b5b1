"""The trial of a model: the first runs, which find out how it is called, what it returns and which layers it has.

May import `models.row_memory`, compute and below.
"""
