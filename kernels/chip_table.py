"""What was measured and checked on chips. Written by `bench/chip.py --record`; see `tuning.py`.

Without a row, a backend that needs it is compared with plain JAX before its first use (`selfcheck.py`), and the order
of `backends.BACKENDS` decides which is taken.
"""

# (backend, chip, version of jax) -> features of calls (`tuning.Features`) -> the day on which the backend was right
PROVEN: dict[tuple[str, str, str], dict[tuple[str, int, int, bool, bool, str, str, bool, bool], str]] = {}

# (chip, dtype, head size, length, mask, bias, dropout), as in `tuning_table.py` -> the fastest backend
FASTEST: dict[tuple[str, str, int, int, str, str, bool], str] = {}
