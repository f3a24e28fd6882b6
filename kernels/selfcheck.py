"""Proven, not probed: whether a kernel may be chosen by default on this device.

A kernel that was tested in an interpreter and compiled for its chip has still not run on the chip. A call whose
features are on record as right (`chip_table.py`, written by `bench/chip.py`) is taken. One that is not is compared
first: its output, lse and every gradient with plain JAX's (`conformance.py`), on rows of such a call. The comparison
runs in a process of its own with a time limit, since a fault would take the device context of this one with it, and a
hang would never return. Several hosts decide together, since different programs on them would wait for each other for
ever.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import jax

from .tuning import Features, proven

LIMIT = 240.0
"""Seconds that a comparison may take: it starts JAX and compiles six small programs."""

COMMAND = (sys.executable, "-m", f"{__package__}.conformance")
"""The process that compares: it reads a job, and prints what is wrong."""

# Length -> number of rows. Each is more work than a chip can start at once, so that persistent blocks process several
# items in turn; neither fills its last tile.
SHORT, LONG = {120: 20, 250: 10}, {640: 2, 1100: 1}


def trusted(name: str, features: Features) -> bool:
    """Tell whether backend `name` may be chosen by default for calls of these features; warn, once, if it may not."""
    return proven(name, features) or _agrees(name, features)


@cache
def _agrees(name: str, features: Features) -> bool:
    failure = compared(name, features)
    if others := _elsewhere(f"{name} {dataclasses.astuple(features)}", failure is None):
        failure = failure or f"it failed on host {', '.join(map(str, others))}"
    if failure is None:
        return True
    warnings.warn(
        f"attention: the {name} kernel is not used for {features}: {failure}. `python3 bench/chip.py --out DIR` says "
        "more. To use it anyway, select it by name.",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def compared(name: str, features: Features) -> str | None:
    """Compare a backend with plain JAX, in a process of its own; return what is wrong with it, or None."""
    if jax.default_backend() == "tpu":
        return "it is not on record as right, and a TPU is one process's alone, so that no other could compare it here"
    job = {"implementation": name, "dtype": features.dtype, "cases": cases(features)}
    # The device is shared with this process, which may hold most of its memory.
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    try:
        done = subprocess.run(
            COMMAND, env=environment, input=json.dumps(job), capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return f"a comparison with plain JAX took more than {LIMIT:.0f} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [""]
        return f"a comparison with plain JAX ended with {done.returncode}: {lines[-1][:300]}"
    wrong = json.loads(done.stdout)["wrong"]
    return "; ".join(wrong) or None


def cases(features: Features) -> list[dict[str, Any]]:
    """Return cases (fields of `conformance.Case`) of these features, of rows that fill tiles and rows that do not."""
    heads, key_heads = 16, 8 if features.grouped else 16
    options: dict[str, Any] = {"softcap": 3.0} if features.softcap else {}
    if "causal" in features.mask:
        options["causal"] = True
    if "window" in features.mask:
        options["window"] = (70, 0 if "causal" in features.mask else 30)
    return [
        {
            "name": f"{rows} x {length}",
            "sizes": (rows, length, length, heads, key_heads, features.size, features.value_size),
            "bias": {"none": None, "row": "relative", "dense": "dense"}[features.bias],
            "bias_shape": (1, heads),
            "segments": "packed" if "segments" in features.mask else None,
            "rate": 0.1 if features.dropout else 0.0,
            "options": options,
        }
        for length, rows in (SHORT if features.short else LONG).items()
    ]


def _elsewhere(key: str, verdict: bool) -> Sequence[int]:
    """Tell every other process of this program the verdict; return those whose own is no."""
    if jax.process_count() == 1:
        return ()
    from jax._src import distributed  # the store by which the processes of one program found each other

    client = distributed.global_state.client
    assert client is not None
    place = f"bestiary/attention/{key}"
    client.key_value_set(f"{place}/{jax.process_index()}", "yes" if verdict else "no")
    limit = int((LIMIT + 60) * 1000)
    return [
        process
        for process in range(jax.process_count())
        if client.blocking_key_value_get(f"{place}/{process}", limit) == "no"
    ]
