"""Preparation of requests: files are decoded, pixels resized, arrays and targets checked, in threads and processes.

May import models and below.
"""
