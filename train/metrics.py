"""Metrics as sums and weights, so that they add up exactly over devices, accumulation steps and hosts.

A step returns `{name: (sum, weight)}`, float32 scalars; the mean is formed once, at the end, from the added pairs.
"""

import math
from collections.abc import Mapping
from typing import Any

Sums = dict[str, tuple[Any, Any]]


class Meter:
    """Add up a window of steps on the host, in float64. The state is saved in checkpoints, as JSON."""

    def __init__(self, state: Mapping[str, list[float]] | None = None):
        self._sums = {name: [float(total), float(weight)] for name, (total, weight) in (state or {}).items()}

    def add(self, sums: Mapping[str, tuple[Any, Any]]) -> None:
        """Add one step's sums (arrays on the host)."""
        for name, (total, weight) in sums.items():
            kept = self._sums.setdefault(name, [0.0, 0.0])
            kept[0] += float(total)
            kept[1] += float(weight)

    def means(self) -> dict[str, float]:
        """Return the means since the last reset, of the metrics with a non-zero weight."""
        return {name: total / weight for name, (total, weight) in self._sums.items() if weight}

    def state(self) -> dict[str, list[float]]:
        """Return the state from which a new Meter can continue."""
        return {name: list(pair) for name, pair in self._sums.items()}

    def reset(self) -> None:
        """Start a new window."""
        self._sums = {}


def finite(sums: Mapping[str, tuple[Any, Any]]) -> bool:
    """Tell whether every sum is finite."""
    return all(math.isfinite(float(total)) for total, _ in sums.values())
