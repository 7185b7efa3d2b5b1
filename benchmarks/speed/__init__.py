"""Speed and precision: ratios against peers, limits and references. `make bench` prints most of them as one table."""
