"""The interface of pretraining objectives.

An objective says what its rows are made of, how they are corrupted on the device, what each of its losses is divided by
before the model runs, and the losses. The loop knows nothing else of it. A new one is a file beside this one, a line in
`OBJECTIVES` (objectives.py), and a word in the families that can learn it.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import jax
import numpy as np

from ...data import DocumentStore
from ...data.corpus.document_store import Split
from ...data.stream import RowSource
from ...models.heads.losses import PredictionSums

Batch = dict[str, jax.Array]


class Objective(Protocol):
    """A way of learning from text without labels. Each of its losses has a name, such as `mlm`."""

    @property
    def head(self) -> str:
        """Head of the model that it needs."""
        ...

    @property
    def shown(self) -> tuple[str, ...]:
        """Metrics to show on the progress line, in addition to the loss."""
        ...

    def rows(
        self,
        store: DocumentStore,
        split: Split,
        *,
        sequence_length: int,
        seed: int,
        copies: int | None,
        validation_fraction: float,
    ) -> RowSource:
        """Return the rows of a tokenised corpus; the arguments are those of `DocumentRows`."""
        ...

    def corrupt(self, key: jax.Array, batch: Batch) -> Batch:
        """Draw the model's inputs and labels, on the device.

        Args:
            key: random key, the same for the whole run; each row folds its `row_ids` into it, so that the result does
                not depend on the mesh, accumulation or the number of hosts.
            batch: a batch of `rows`.
        """
        ...

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Return each loss's weight, its denominator, summed over a corrupted batch; float32 scalars."""
        ...

    def losses(self, model: Any, params: Any, batch: Batch, **mode: Any) -> dict[str, PredictionSums]:
        """Compute the sums of each loss over a corrupted batch.

        Args:
            model: a model with `head`.
            params: its parameters.
            batch: a corrupted batch, with row numbers as `rows`.
            mode: `deterministic` and `rngs` for the model.
        """
        ...

    def samples(self, model: Any, params: Any, rows: dict[str, np.ndarray]) -> Iterable[str]:
        """Yield lines that illustrate what the model has learnt.

        Args:
            model: a model with `head`.
            params: its parameters, on the host.
            rows: a batch of held-out rows.
        """
        ...
