"""Objectives that carry what was read before from batch to batch, through streams of text."""
