"""Pretraining: one loop, one file an objective."""
