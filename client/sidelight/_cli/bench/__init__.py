"""The load generator `sidelight bench`.

May import everything in the client; `plot` needs the extra `sidelight[plot]`.
"""
