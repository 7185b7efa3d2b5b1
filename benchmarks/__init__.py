"""Measurements: `make bench` runs most of them, each module can be run alone. OpenMP is configured as in the server."""

from sidelight_server.app.openmp import sleep_soon

sleep_soon()
