"""The fine-tuning commands, one file per kind of task: their settings, and reading their data.

Training code is imported where it is called, since it imports JAX, which would delay `--help`.
"""
