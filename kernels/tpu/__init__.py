"""Attention for TPUs (Pallas on Mosaic TPU)."""
