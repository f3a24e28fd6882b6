"""How many cores there are to work with."""

import os


def usable_cores() -> int:
    """That this process may use; not every system tells which."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
