"""Number of usable CPU cores."""

import os


def usable_cores() -> int:
    """Return the number of cores that this process may use; not every system can tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
