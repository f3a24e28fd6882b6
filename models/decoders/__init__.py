"""Families of decoders without a source: language models."""
