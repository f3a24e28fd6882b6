"""The jobs of a benchmark's worker: where it runs, checks of a backend, the chip's ceilings, a contestant's times.

`python -m bestiary.kernels.bench.jobs` is that worker (`workers.serve`). Whoever asks it need not touch a device: only
one process can use a TPU, and a device context that a kernel has broken is lost for its process.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import tuning
from ..conformance import case_of, compare, features
from . import peers
from .cases import Arrays, Case, draw
from .peers import Refused, enter
from .timing import machine, measure_ceilings
from .workers import Worker, serve

# Largest relative error (of norms) against XLA in float32: a few roundings to 8, 11 and 24 bits.
TOLERANCE = {"bfloat16": 3e-2, "float16": 5e-3, "float32": 2e-3}


def worker(log: Path, environment: Mapping[str, str] | None = None, *, startup: float = 60.0) -> Worker:
    """Return a worker for the jobs of this module. (As its main module this one has another name.)"""
    return Worker([sys.executable, "-m", f"{__package__}.jobs"], environment=environment, log=log, startup=startup)


def where(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the device, its platform and short name, and the versions."""
    del job
    return {"platform_name": jax.default_backend(), "chip": tuning.chip() or "cpu", **machine()}


def check(job: Mapping[str, Any]) -> dict[str, Any]:
    """Compare a backend with plain JAX on this device, as `conformance.compare` does.

    The job has "case" (fields of `conformance.Case`), "implementation", "dtype" and, for small cases, "exact".
    """
    case, name, dtype = case_of(job["case"]), job["implementation"], job["dtype"]
    found = compare(case, name, dtype, exact=job.get("exact", False))
    return {**found, "features": dataclasses.astuple(features(case, dtype))}


def ceilings(job: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the ceilings for "dtype", with the "timing" options of `timing.sampled`."""
    return measure_ceilings(job["dtype"], **job["timing"])._asdict()


def contest(job: Mapping[str, Any]) -> dict[str, Any]:
    """Compare a contestant with XLA in float32, then time it.

    The job has "case" (fields of `cases.Case`), the contestant's "name", "sets" of inputs, their "seed", and "timing".

    Returns:
      "errors" by array, and the `Seconds` of "forward" and "backward"; or "reason", why it was not timed, with "wrong"
      if that is its results.
    """
    case = timing_case(job["case"])
    entry: dict[str, Any] = {}
    try:
        sets, truth = prepared(case, job["sets"], job["seed"])
        runner = enter(job["name"], case, sets, job["timing"])
        found = runner.results()
        entry["errors"] = {name: relative_error(found[name], truth[name]) for name in truth}
        worst = max(entry["errors"], key=lambda name: entry["errors"][name])
        if not entry["errors"][worst] <= TOLERANCE[case.dtype]:
            reason = f"{worst} differs from XLA in float32 by {entry['errors'][worst]:.2g}: not timed"
            entry["errors"] = {name: error for name, error in entry["errors"].items() if math.isfinite(error)}
            return entry | {"wrong": True, "reason": reason}
        entry["forward"] = runner.forward()._asdict()
        entry["backward"] = runner.backward()._asdict()
    except Refused as refusal:
        entry["reason"] = str(refusal)
    return entry


HANDLERS = {"where": where, "check": check, "ceilings": ceilings, "contest": contest}


@functools.lru_cache(maxsize=1)
def prepared(case: Case, sets: int, seed: int) -> tuple[list[Arrays], dict[str, np.ndarray]]:
    """Draw a case's inputs, and compute the right results for the first: XLA in float32 at the highest precision."""
    drawn = draw(case, sets, seed)
    wide = dataclasses.replace(case, dtype="float32")
    first = drawn[0]
    exact = first._replace(
        **{name: getattr(first, name).astype(jnp.float32) for name in ("query", "key", "value", "wave")}
    )
    with jax.default_matmul_precision("highest"):
        return drawn, peers.JaxRunner(functools.partial(peers.ours, "xla"), wide, [exact], {}).results()


def timing_case(fields: Mapping[str, Any]) -> Case:
    """Build a case to be timed from its fields as JSON keeps them."""
    return Case(**{**fields, "window": tuple(fields["window"])})


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the norm of the difference over the norm of `expected`; infinite if anything is not finite."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-30))


if __name__ == "__main__":
    serve(HANDLERS)
