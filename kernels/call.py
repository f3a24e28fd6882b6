"""One checked call of `attention`, as the backends receive it."""

from __future__ import annotations

import dataclasses

from jax import Array

from .bias import Bias


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one call, checked, with every default filled in. The fields mean what `attention` says.

    Arrays may be traced; everything else is static.
    """

    query: Array
    key: Array
    value: Array
    bias: Bias | None
    query_segment_ids: Array | None
    key_segment_ids: Array | None
    dropout_seeds: Array | None
    """uint32 [B, 2], one seed a row; None exactly when `dropout_rate` is 0."""
    causal: bool
    window: tuple[int | None, int | None]
    scale: float
    softcap: float | None
    dropout_rate: float

    @property
    def sides(self) -> tuple[int | None, int | None]:
        """How many keys are seen before and after the query's own place, None for no limit: the window with causality.

        A causal row never looks right, whatever the window says.
        """
        left, right = self.window
        return left, 0 if self.causal else right
