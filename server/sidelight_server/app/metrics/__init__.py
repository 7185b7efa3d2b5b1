"""Metrics: what Prometheus scrapes, and the HTTP endpoint that it scrapes."""
