"""Check that all processes of a run were started with the same settings and read the same data."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ..errors import RunError


def require_agreement(what: str, values: Mapping[str, Any]) -> None:
    """Compare values, which JSON can write, with those of the other processes. All processes must call it.

    Raises:
        RunError: they differ; in every process, with the names of those that do and the processes that have others
            than process 0.
    """
    if jax.process_count() == 1:
        return
    names = sorted(values)
    every = multihost_utils.process_allgather(_digest(names))
    if (every != every[0]).any():
        raise RunError(f"{what} differ: processes {_apart(every)} have others than process 0. Is it the same version?")
    digests = multihost_utils.process_allgather(np.stack([_digest(values[name]) for name in names]))
    differ = [name for number, name in enumerate(names) if (digests[:, number] != digests[0, number]).any()]
    if differ:
        apart = _apart(digests.reshape(len(digests), -1))
        raise RunError(
            f"{what} differ between the processes: {', '.join(differ)}, in process {apart} from process 0. Start the "
            "same command on every host."
        )


def _digest(value: Any) -> np.ndarray:
    text = json.dumps(value, sort_keys=True, default=str).encode()
    return np.frombuffer(hashlib.sha256(text).digest()[:8], np.uint32)


def _apart(every: np.ndarray) -> str:
    return ", ".join(str(process) for process, own in enumerate(every) if (own != every[0]).any())
