"""Process settings that make XLA faster on a CPU, and cannot be made through JAX.

Every command calls `prepare_cpu` before JAX starts. A process that only decodes also calls `yield_to_callers` once JAX
has started, and `return_freed_memory` from time to time. Nothing here affects accelerators.
"""

import contextlib
import ctypes
import os
from pathlib import Path

XLA_FLAGS = {
    # 512-bit registers if the CPU has them; XLA's default is 256.
    "--xla_cpu_prefer_vector_width": 512,
    # XLA's default is 3. Level 3 made no program faster that was measured, but takes most of the time to compile an
    # encoder (4.7 s, 0.6 s without) or new weights (10.7 s, 2.9 s without).
    "--xla_backend_optimization_level": 2,
}
HELPERS = "tf_XLAEigen"  # the name of the threads that XLA divides one operation among
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -3, -4, -8  # malloc.h of glibc


def prepare_cpu() -> None:
    """Set up the process, before JAX and its threads start. Does nothing if the machine has an accelerator."""
    devices = (path for pattern in ("nvidia[0-9]*", "accel*", "vfio/[0-9]*") for path in Path("/dev").glob(pattern))
    if os.environ.get("JAX_PLATFORMS") == "cpu" or next(devices, None) is None:
        set_compiler_flags()
        keep_freed_memory()


def set_compiler_flags() -> None:
    """Add the flags that the user has not set to XLA_FLAGS, which XLA reads when it starts."""
    given = os.environ.get("XLA_FLAGS", "")
    more = (f"{flag}={value}" for flag, value in XLA_FLAGS.items() if flag not in given)
    os.environ["XLA_FLAGS"] = " ".join((given, *more)).strip()


def keep_freed_memory() -> None:
    """Make malloc keep freed memory, so that a step reuses the pages of the step before.

    By default glibc returns large blocks to the kernel at once, and every step then pays for new pages: a tenth to a
    fourth of a training step's time. The price is that the process keeps its peak memory. Call it before other threads
    start, since each may get an arena that follows the old rules. Without glibc nothing happens.
    """
    _set_malloc((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 256 << 20), (M_ARENA_MAX, 1))


def return_freed_memory() -> None:
    """Return unused memory to the kernel, and make malloc return large blocks from now on.

    For a process that runs for long with blocks of many sizes. If all were kept (`keep_freed_memory`), blocks of one
    size would leave gaps that those of another do not fit, and the process would grow without end. The temporaries of
    a decoding step are below the threshold, and are still kept: new pages for them would take a tenth of its time.
    """
    _set_malloc((M_MMAP_MAX, 2**16), (M_MMAP_THRESHOLD, 4 << 20), (M_TRIM_THRESHOLD, 16 << 20), (M_TOP_PAD, 16 << 20))
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _set_malloc(*options: tuple[int, int]) -> None:
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in options:
            mallopt(option, value)


def yield_to_callers() -> None:
    """Keep XLA's helper threads from preempting the threads that call XLA, one on each core.

    The helper threads take over parts of every matrix product, whatever `xla_cpu_multi_thread_eigen` says. If every
    core has a caller already, that only moves work between cores. With the scheduling policy for batch jobs they get
    their share of the cores but wait for it, which saves beam search 5 % of its CPU time. This needs Linux.
    """
    with contextlib.suppress(OSError, AttributeError):
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                if (thread / "comm").read_text().strip() == HELPERS:
                    os.sched_setscheduler(int(thread.name), os.SCHED_BATCH, os.sched_param(0))


def lacks_bfloat16() -> bool:
    """Tell whether this CPU lacks bfloat16 arithmetic, which makes bfloat16 the slower choice; False if unknown."""
    with contextlib.suppress(OSError):
        words = set(Path("/proc/cpuinfo").read_text().split())
        return bool(words & {"avx2", "asimd"}) and not words & {"avx512_bf16", "amx_bf16", "bf16"}
    return False
