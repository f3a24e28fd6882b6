"""Rows of one objective each, addressed by their number."""
