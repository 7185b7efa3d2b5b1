"""Input images: files are decoded to pixels, and pixels become the size and channels that a model takes.

May import `errors` alone: decoder processes start quickly because they load nothing else.
"""
