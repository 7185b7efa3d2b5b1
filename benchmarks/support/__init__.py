"""What the measurements share: models, requests, clients that speak raw HTTP/2, and how to measure."""
