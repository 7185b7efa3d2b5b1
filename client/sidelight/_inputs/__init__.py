"""Input values: images, targets, tensors and enums are validated and become messages.

May import `visualization`, `exceptions` and `v1`.
"""
