"""Measurements: attention beside its peers, layers over the row's length, and the tuning of block sizes."""
