"""Where a model comes from, and how pictures become its input."""
