"""What a contestant of the attention benchmark offers, in whatever library it is written."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from .timing import Seconds


class Refused(Exception):
    """Raised, with the reason, by a contestant that does not support a case."""


class Runner(Protocol):
    """A contestant, set up with the arrays of one case."""

    def results(self) -> dict[str, np.ndarray]:
        """Return the output and gradients for the first set of inputs, float32."""
        ...

    def forward(self) -> Seconds: ...

    def backward(self) -> Seconds:
        """Time the gradients alone, from what the forward pass has saved."""
        ...
