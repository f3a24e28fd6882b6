"""Measured block sizes by `tuning.Key`. Written by `bestiary bench attention --tune`; see `tuning.py`.

A call without a row uses its backend's default (`blocks_for` in `hopper/backend.py`, `choose_blocks` in
`tpu/backend.py`).
"""

from typing import Any

# (chip, dtype, head size, length, mask, bias, dropout) -> the fields of the backend's block sizes
ROWS: dict[tuple[str, str, int, int, str, str, bool], dict[str, Any]] = {}
