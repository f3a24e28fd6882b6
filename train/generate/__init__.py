"""Generating text: greedy search, beam search, sampling."""
