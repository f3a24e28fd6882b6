"""Speed of training steps: time, model FLOPs utilisation, and the memory that is in use."""

from collections.abc import Callable, Hashable
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
        self._operations: dict[Hashable, float] = {}  # of a step, by the shapes of its batch
        self._window: list[float] = []  # operations of the steps since the last call of `of_step`

    def compiles(self, shape: Hashable, trace: Callable[[], Any]) -> None:
        """Count the operations of a step that is about to be compiled, on chips whose peak is known."""
        if self._chip is not None:
            self._operations[shape] = operations(trace().jaxpr.jaxpr)

    def ended(self, shape: Hashable) -> None:
        """Note a step of that shape, whose time is part of the next `of_step`."""
        if self._chip is not None:
            self._window.append(self._operations[shape])

    def of_step(self, seconds: float) -> dict[str, float]:
        """Return what is known of the steps since the last call, which took `seconds` on average.

        They are `seconds_per_step`, `mfu` (with --remat a lower bound, see `operations`) and `memory_gib`, the most so
        far.
        """
        found = {"seconds_per_step": seconds}
        if self._chip is not None and self._window:
            mean = sum(self._window) / len(self._window)
            found["mfu"] = mean / seconds / (self._chip.flops * jax.device_count())
            self._window.clear()
        memory = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            found["memory_gib"] = memory["peak_bytes_in_use"] / 2**30
        return found
