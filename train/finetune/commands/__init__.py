"""The commands that fine-tune on a task, one file a kind: their settings, and the data that they read.

What trains is imported where it is called: `--help` is to be quick, and needs no JAX.
"""
