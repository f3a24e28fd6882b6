"""Timing on the device, the chip's measured ceilings, and the files that a benchmark writes.

One compiled program calls the function on several sets of inputs, one after the other (`optimization_barrier` makes
each call wait for the one before), so that no call finds its inputs in a cache. The program is launched as often as
needed to fill `least_seconds`, without waiting in between, and the clock stops when the last launch is done. The chip
is thus never idle between calls, and the measured time is the chip's. Of several such samples the median is reported,
with the shortest and the longest. Compilation and two warm-up runs come first.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

METHOD = (
    "Calls run back to back inside compiled programs, on rotating inputs, with programs queued without waiting: times "
    "are per call, on the device, without launches. Median of the samples, with the shortest and the longest. PyTorch: "
    "the same, by CUDA events on a GPU and by the clock on a CPU."
)
PACKAGES = (
    "bestiary",
    "jax",
    "jaxlib",
    "numpy",
    "libtpu",
    "jax-cuda13-plugin",
    "nvidia-cudnn-cu13",
    "tokamax",
    "torch",
)


class Seconds(NamedTuple):
    """Seconds per call."""

    median: float
    shortest: float
    longest: float


def sampled(
    start: Callable[[], Any], finish: Callable[[Any], Any], calls: int, *, samples: int, least_seconds: float
) -> Seconds:
    """Return `Seconds` per call, where `start` queues `calls` calls and `finish` waits for what it returned."""
    finish(start())
    clock = time.perf_counter()
    finish(start())
    once = time.perf_counter() - clock
    launches = max(1, min(64, round(least_seconds / max(once, 1e-9))))
    found = []
    for _ in range(samples):
        clock = time.perf_counter()
        for _ in range(launches - 1):
            start()
        finish(start())
        found.append((time.perf_counter() - clock) / (launches * calls))
    return Seconds(statistics.median(found), min(found), max(found))


def one_after_the_other(function: Callable[..., Any]) -> Callable[[Sequence[Any]], list[Any]]:
    """Compile a program that calls `function` on each of a sequence of argument tuples, one after the other."""

    def program(sets: Sequence[Any]) -> list[Any]:
        results: list[Any] = []
        for arguments in sets:
            if results:
                arguments, results[-1] = lax.optimization_barrier((arguments, results[-1]))
            results.append(function(*arguments))
        return results

    return program


def time_jax(function: Callable[..., Any], sets: Sequence[Any], *, samples: int, least_seconds: float) -> Seconds:
    """Return `Seconds` per call of `function(*arguments)`, over the argument tuples in `sets`."""
    program = jax.jit(one_after_the_other(function)).lower(sets).compile()
    return sampled(
        lambda: program(sets), jax.block_until_ready, len(sets), samples=samples, least_seconds=least_seconds
    )


class Ceilings(NamedTuple):
    """Rates that this chip reaches on a large matrix product and on a large copy."""

    operations: float
    """Floating-point operations per second."""
    bytes: float
    """Bytes per second, read plus written."""

    def seconds(self, operations: float, bytes_: float) -> float:
        """Return the minimum time of this much work, with arithmetic and memory traffic perfectly overlapped."""
        return max(operations / self.operations, bytes_ / self.bytes)


def measure_ceilings(dtype: str, *, samples: int, least_seconds: float) -> Ceilings:
    """Measure the ceilings instead of looking them up, so that they hold for this chip as it is cooled and clocked."""
    small = jax.default_backend() == "cpu"
    size, elements = (1024, 1 << 24) if small else (8192, 1 << 28)
    make = jax.jit(lambda key: jax.random.normal(key, (size, size)).astype(dtype))
    pairs = [(make(jax.random.key(n)), make(jax.random.key(n + 9))) for n in range(2)]
    product = time_jax(lambda a, b: a @ b, pairs, samples=samples, least_seconds=least_seconds)
    arrays = [(jnp.full((elements,), n, jnp.int32),) for n in range(2)]
    copy = time_jax(lambda x: x + 1, arrays, samples=samples, least_seconds=least_seconds)
    return Ceilings(2 * size**3 / product.median, 2 * 4 * elements / copy.median)


def machine() -> dict[str, Any]:
    """Return the device, date and versions of a measurement."""
    device = jax.devices()[0]
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "device": f"{_cores()}, {platform.machine()} CPU" if device.platform == "cpu" else device.device_kind,
        "devices": jax.device_count(),
        "platform": getattr(device.client, "platform_version", device.platform),
        "python": platform.python_version(),
        "versions": versions,
    }


def _cores() -> str:
    """Say how many of the machine's cores this process may use."""
    every = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else every
    return f"{every} cores" if usable == every else f"{usable} of {every} cores"


def write(path: Path, content: str | bytes) -> None:
    """Write a file atomically: an interruption leaves the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as handle:
        handle.write(content.encode() if isinstance(content, str) else content)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; raise an error for NaN and infinity, which JSON does not have."""
    write(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table with aligned columns, all but the first to the right."""
    widths = [max(3, *(len(row[n]) for row in (headers, *rows))) for n in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]) + " |"

    rule = "| " + " | ".join(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]) + " |"
    return "\n".join([line(headers), rule, *(line(row) for row in rows)])
