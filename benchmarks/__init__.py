"""Measurements: `make bench` runs most of them, each module can be run alone. OpenMP is configured as in the server."""

import contextlib

with contextlib.suppress(ModuleNotFoundError):  # the peers' environments have no sidelight, and inherit the variable
    from sidelight_server.app.openmp import limit_spinning

    limit_spinning()
