"""The command `sidelight`: its options, and the tables that it prints.

May import everything in the client; needs the extra `sidelight[cli]`.
"""
