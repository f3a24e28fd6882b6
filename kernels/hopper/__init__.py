"""Attention for Hopper GPUs (Pallas on Mosaic GPU)."""
