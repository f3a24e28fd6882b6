"""Speed of training steps: time, model FLOPs utilisation, and the memory that is in use."""

from collections.abc import Callable
from typing import Any

import jax

from .chips import chip_of
from .operations import operations


class Speed:
    """Measures of a step on these devices.

    Args:
        main: whether this process logs; the others count nothing.
    """

    def __init__(self, main: bool):
        self._chip = chip_of(jax.devices()[0].device_kind) if main else None
        self._operations: float | None = None

    def compiles(self, trace: Callable[[], Any]) -> None:
        """Count the operations of a step that is about to be compiled, on chips whose peak is known."""
        if self._chip is not None:
            self._operations = operations(trace().jaxpr.jaxpr)

    def of_step(self, seconds: float) -> dict[str, float]:
        """Return what is known of steps of this length: `seconds_per_step`, `mfu` and `memory_gib`, the most so far."""
        found = {"seconds_per_step": seconds}
        if self._chip is not None and self._operations is not None:
            found["mfu"] = self._operations / seconds / (self._chip.flops * jax.device_count())
        memory = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            found["memory_gib"] = memory["peak_bytes_in_use"] / 2**30
        return found
