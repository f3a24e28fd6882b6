"""Pretraining: one loop, and one file per objective."""
