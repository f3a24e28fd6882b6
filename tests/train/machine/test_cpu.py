"""What is set from outside JAX on a CPU."""

import contextlib
import ctypes
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from bestiary.train.machine.cpu import HELPERS, yield_to_callers


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="only Linux's threads have a policy to change")
def test_helper_threads_of_xla_are_found_and_made_to_wait() -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("the helper threads are those of the CPU's backend")
    yield_to_callers()
    helpers = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread of an earlier test, which has ended
            helpers += [task] if (task / "comm").read_text().strip() == HELPERS else []
    assert helpers
    assert {os.sched_getscheduler(int(task.name)) for task in helpers} == {os.SCHED_BATCH}
    assert os.sched_getscheduler(0) != os.SCHED_BATCH


KEEP_AND_RETURN = """
import resource
from pathlib import Path
from bestiary.train.machine.cpu import keep_freed_memory, return_freed_memory

keep_freed_memory()
import numpy as np

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20

before = resident()
blocks = [np.ones(1 << 18) for _ in range(100)]  # 2 MiB each
del blocks[::2]
kept = resident()
return_freed_memory()
returned = resident()
large = np.ones(8 << 20)  # 64 MiB
del large
print(kept - before, returned - before, resident() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="memory is only glibc's to keep or to return")
def test_memory_is_kept_until_it_is_asked_for() -> None:
    run = subprocess.run([sys.executable, "-c", KEEP_AND_RETURN], capture_output=True, text=True, check=True)
    kept, returned, after = map(int, run.stdout.split())
    assert kept >= 195  # what was freed too
    assert 95 <= returned <= 110  # the gaps are gone
    assert after <= 110
