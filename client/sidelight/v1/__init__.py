"""The generated messages and stubs of `proto/sidelight/v1`. Written by `make proto`."""
