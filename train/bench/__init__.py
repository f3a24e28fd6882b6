"""Measurements of whole jobs."""
