"""What makes XLA fast on a CPU and must be said from outside. Neither setting changes what an accelerator does."""

import contextlib
import ctypes
import os
from pathlib import Path

VECTOR_WIDTH = "--xla_cpu_prefer_vector_width"
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # malloc.h of glibc


def prepare_cpu() -> None:
    """Both settings, before JAX and its threads start; memory is left alone where an accelerator is in sight."""
    prefer_wide_vectors()
    devices = (path for pattern in ("nvidia[0-9]*", "accel*", "vfio/[0-9]*") for path in Path("/dev").glob(pattern))
    if os.environ.get("JAX_PLATFORMS") == "cpu" or next(devices, None) is None:
        keep_freed_memory()


def prefer_wide_vectors() -> None:
    """Let XLA's CPU compiler use 512-bit registers where there are any (its default is 256).

    It reads XLA_FLAGS when it starts. A width that the user set stays.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if VECTOR_WIDTH not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {VECTOR_WIDTH}=512".strip()


def keep_freed_memory() -> None:
    """Have malloc keep what is freed: a step's temporaries are the next step's.

    By default glibc returns large blocks to the kernel at once, and every step then pays for fresh pages: a tenth to
    a fourth of a training step's time. The process holds its peak memory instead. It has to come before other threads
    start, since each may get an arena that follows the old rules. Nothing happens without glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 256 << 20), (M_ARENA_MAX, 1)):
            mallopt(option, value)
