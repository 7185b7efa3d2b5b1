"""The command `sidelight`: options, tables and the load generator.

May import everything in the client; needs the extra `sidelight[cli]`.
"""
