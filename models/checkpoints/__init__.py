"""Checkpoint folders of the released format: load, save, and comparison with the reference implementation."""
