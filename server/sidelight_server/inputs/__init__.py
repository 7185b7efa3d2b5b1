"""Input images: decodes files to pixels, and converts pixels to the size and channels that a model takes.

May import only `errors`, so that decoder processes start quickly.
"""
