"""Settings, model specifications and their options.

May import `telemetry`, `domain`, `methods`, `inputs` and `errors`. Importing it does not import torch.
"""
