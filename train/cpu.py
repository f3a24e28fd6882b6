"""What makes XLA fast on a CPU and must be said from outside. No setting changes what an accelerator does."""

import contextlib
import ctypes
import os
from pathlib import Path

VECTOR_WIDTH = "--xla_cpu_prefer_vector_width"
HELPERS = "tf_XLAEigen"  # the name of XLA's threads within operations
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # malloc.h of glibc


def prepare_cpu() -> None:
    """What every command wants, before JAX and its threads start.

    Memory is left alone where an accelerator is in sight.
    """
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


def run_in_callers() -> None:
    """Have each program run in the thread that calls it, as threads want that each have work of their own.

    JAX reads this when it starts; later nothing happens. By default the caller waits for a thread of JAX's.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def spare_callers() -> None:
    """Keep XLA's helper threads from interrupting the threads that call it.

    They take over parts of every product, whatever `xla_cpu_multi_thread_eigen` says. Where each core has a caller,
    that only moves work about. As batch threads they have their share of the cores as before, but wait for it. Nothing
    happens where threads are not Linux's.
    """
    with contextlib.suppress(OSError, AttributeError):
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                if (thread / "comm").read_text().strip() == HELPERS:
                    os.sched_setscheduler(int(thread.name), os.SCHED_BATCH, os.sched_param(0))
