"""Checkpoint folders in the released format: load, save, and compare with the reference implementation."""
