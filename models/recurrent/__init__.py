"""Recurrent networks: what the Transformer replaced."""
