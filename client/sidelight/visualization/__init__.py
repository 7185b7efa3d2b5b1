"""Pictures of maps: overlays, color maps and galleries.

May import only `exceptions`.
"""
