"""What is measured, each module by itself or all by `make bench`. OpenMP is set as the server's own process sets it."""

from sidelight_server.app.openmp import sleep_soon

sleep_soon()
