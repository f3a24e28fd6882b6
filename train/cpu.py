"""Process-level settings that make XLA fast on a CPU. None of them affects an accelerator."""

import contextlib
import ctypes
import os
from pathlib import Path

XLA_FLAGS = {
    # 512-bit registers where there are any; XLA's own default is 256.
    "--xla_cpu_prefer_vector_width": 512,
    # XLA's own default is 3. What that does beyond 2 made no program faster that was measured, and takes most of the
    # time to compile an encoder (4.7 s, 0.6 without) or new weights (10.7 s, 2.9 without).
    "--xla_backend_optimization_level": 2,
}
HELPERS = "tf_XLAEigen"  # the name of XLA's threads within operations
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -3, -4, -8  # malloc.h of glibc


def prepare_cpu() -> None:
    """Prepare the process for any command, before JAX and its threads start.

    Where an accelerator is in sight, memory and XLA are left alone.
    """
    devices = (path for pattern in ("nvidia[0-9]*", "accel*", "vfio/[0-9]*") for path in Path("/dev").glob(pattern))
    if os.environ.get("JAX_PLATFORMS") == "cpu" or next(devices, None) is None:
        set_compiler_flags()
        keep_freed_memory()


def set_compiler_flags() -> None:
    """Add to XLA_FLAGS, which XLA reads when it starts, what the user has not set."""
    given = os.environ.get("XLA_FLAGS", "")
    more = (f"{flag}={value}" for flag, value in XLA_FLAGS.items() if flag not in given)
    os.environ["XLA_FLAGS"] = " ".join((given, *more)).strip()


def keep_freed_memory() -> None:
    """Have malloc keep what is freed: a step's temporaries are the next step's.

    By default glibc returns large blocks to the kernel at once, and every step then pays for fresh pages: a tenth to
    a fourth of a training step's time. The process holds its peak memory instead. It has to come before other threads
    start, since each may get an arena that follows the old rules. Nothing happens without glibc.
    """
    _set_malloc((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 256 << 20), (M_ARENA_MAX, 1))


def return_freed_memory() -> None:
    """Give memory back that is not in use, and have malloc do so with large blocks from now on.

    A process that runs long with blocks of many sizes calls this now and then: kept, as `keep_freed_memory` has it,
    those of one size leave gaps that those of another do not fit, and the process grows without end. The temporaries
    of a step of decoding stay below the bound; to fetch these anew each time would take a tenth of its time.
    """
    _set_malloc((M_MMAP_MAX, 2**16), (M_MMAP_THRESHOLD, 4 << 20), (M_TRIM_THRESHOLD, 16 << 20), (M_TOP_PAD, 16 << 20))
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _set_malloc(*options: tuple[int, int]) -> None:
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in options:
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


def lacks_bfloat16() -> bool:
    """Whether nothing on this CPU computes in bfloat16, which makes it the slower choice; False if unsaid."""
    with contextlib.suppress(OSError):
        words = set(Path("/proc/cpuinfo").read_text().split())
        return bool(words & {"avx2", "asimd"}) and not words & {"avx512_bf16", "amx_bf16", "bf16"}
    return False
