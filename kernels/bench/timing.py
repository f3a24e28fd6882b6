"""Timing on the device, the chip's own ceilings, and the files that a bench leaves.

How a time is taken: one compiled program calls the function on several sets of inputs, one after the other (each call
waits for the one before, by `optimization_barrier`), so that no call finds its inputs in a cache; the program is
started as often as fills `least_seconds`, without waiting in between, and the clock stops when the last one is done.
So a chip is never idle for want of the next call, and what is measured is the chip's time. Of several such samples the
median is reported, with the shortest and the longest. Compilation and two warm-up runs come before.
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
    "Calls run back to back inside compiled programs, on rotated inputs, programs queued without waiting: seconds a "
    "call on the device, not counting launches. Median of the samples, with the shortest and the longest. PyTorch: the "
    "same, by CUDA events on a GPU and by the clock on a CPU."
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
    """Of one call."""

    median: float
    shortest: float
    longest: float


def sampled(
    start: Callable[[], Any], finish: Callable[[Any], Any], calls: int, *, samples: int, least_seconds: float
) -> Seconds:
    """`Seconds` a call, where `start` queues `calls` of them and `finish` waits for what it returned."""
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
    """A program that calls `function` on each of a sequence of argument tuples, none before the last is done."""

    def program(sets: Sequence[Any]) -> list[Any]:
        results: list[Any] = []
        for arguments in sets:
            if results:
                arguments, results[-1] = lax.optimization_barrier((arguments, results[-1]))
            results.append(function(*arguments))
        return results

    return program


def time_jax(function: Callable[..., Any], sets: Sequence[Any], *, samples: int, least_seconds: float) -> Seconds:
    """`Seconds` a call of `function(*arguments)`, for the tuples of arguments in `sets`."""
    program = jax.jit(one_after_the_other(function)).lower(sets).compile()
    return sampled(
        lambda: program(sets), jax.block_until_ready, len(sets), samples=samples, least_seconds=least_seconds
    )


class Ceilings(NamedTuple):
    """What this chip reaches on a large matrix product, and on a large copy."""

    operations: float
    """A second."""
    bytes: float
    """A second, read and written."""

    def seconds(self, operations: float, bytes_: float) -> float:
        """The time that this much work takes at the least, if arithmetic and memory overlap perfectly."""
        return max(operations / self.operations, bytes_ / self.bytes)


def measure_ceilings(dtype: str, *, samples: int, least_seconds: float) -> Ceilings:
    """Measured, not looked up: the share of a ceiling is then one of this very chip, as cooled and clocked today."""
    small = jax.default_backend() == "cpu"
    size, elements = (1024, 1 << 24) if small else (8192, 1 << 28)
    make = jax.jit(lambda key: jax.random.normal(key, (size, size)).astype(dtype))
    pairs = [(make(jax.random.key(n)), make(jax.random.key(n + 9))) for n in range(2)]
    product = time_jax(lambda a, b: a @ b, pairs, samples=samples, least_seconds=least_seconds)
    arrays = [(jnp.full((elements,), n, jnp.int32),) for n in range(2)]
    copy = time_jax(lambda x: x + 1, arrays, samples=samples, least_seconds=least_seconds)
    return Ceilings(2 * size**3 / product.median, 2 * 4 * elements / copy.median)


def machine() -> dict[str, Any]:
    """What the figures were measured on, and with."""
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
    """How many cores this process may use, of how many there are."""
    every = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else every
    return f"{every} cores" if usable == every else f"{usable} of {every} cores"


def write(path: Path, content: str | bytes) -> None:
    """Atomically: a kill leaves the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as handle:
        handle.write(content.encode() if isinstance(content, str) else content)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """A JSON file, atomically. NaN and infinity are no JSON: an error here, not in the reader's hands."""
    write(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned; all but the first to the right."""
    widths = [max(3, *(len(row[n]) for row in (headers, *rows))) for n in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]) + " |"

    rule = "| " + " | ".join(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]) + " |"
    return "\n".join([line(headers), rule, *(line(row) for row in rows)])
