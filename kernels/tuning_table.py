"""Measured block sizes, by what `tuning.Key` says. Written by `bestiary bench attention --tune`; see `tuning.py`.

A call that no row fits takes its backend's own rule (`hopper.blocks_for`, `tpu.choose_blocks`).
"""

from typing import Any

# (chip, dtype, head size, length, mask, bias, dropout) -> the fields of the backend's block sizes
ROWS: dict[tuple[str, str, int, int, str, str, bool], dict[str, Any]] = {}
