"""Health: the gRPC health service, `sidelight-server --check`, and the watchdog of the devices.

`health_check` imports neither torch nor numpy.
"""
