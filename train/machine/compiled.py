"""Keep compiled programs between processes: JAX's persistent compilation cache, in the user's cache folder.

Compiling the programs of a small run takes longer than the run; from its second start on they are read. The user's own
JAX_COMPILATION_CACHE_DIR takes precedence, and JAX_ENABLE_COMPILATION_CACHE=0 turns the cache off.

A program belongs to the machine that it was compiled for. JAX's keys cover versions, flags and accelerators, but not a
CPU's instructions, so that these are part of the folder's name: a home folder may be shared by different machines.
"""

import contextlib
import hashlib
import os
import platform
import warnings
from pathlib import Path

from ...data.files import user_cache_folder

SETTINGS = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",  # seconds; reading a program takes some milliseconds
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(4 << 30),  # bytes; beyond, the least recently used programs are deleted
}


def keep_compiled_programs() -> None:
    """Turn the cache on, before JAX starts. Does nothing if its folder cannot be written."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home folder
        folder = user_cache_folder() / "compiled" / _machine()
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
            for name, value in SETTINGS.items():
                os.environ.setdefault(name, value)
            # A program that a kill left half written is compiled again.
            warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")


def _machine() -> str:
    """Return a name of this machine's instructions, the same for machines with the same CPU."""
    words = {platform.machine()}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features", "model name", "CPU part"):
                words.update(value.split())
    return hashlib.sha256(" ".join(sorted(words)).encode()).hexdigest()[:16]
