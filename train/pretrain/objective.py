"""What a pretraining objective is.

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
from ...models.losses import PredictionSums

Batch = dict[str, jax.Array]


class Objective(Protocol):
    """One way to learn from text without labels. Each of its losses has a name, as `mlm`."""

    @property
    def head(self) -> str:
        """Which of a family's models learns it."""
        ...

    @property
    def shown(self) -> tuple[str, ...]:
        """The metrics on the progress line, beside the loss."""
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
        """The rows of a tokenised corpus; the arguments are those of `DocumentRows`."""
        ...

    def corrupt(self, key: jax.Array, batch: Batch) -> Batch:
        """What the model reads and what it is to predict, drawn on the device.

        Args:
            key: the same for the whole run; each row draws from it folded with its `row_ids`, so that neither the mesh
                nor accumulation nor the number of hosts changes what is drawn.
            batch: of `rows`.
        """
        ...

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """The weight that each loss is divided by, summed over a corrupted batch; float32 scalars."""
        ...

    def losses(self, model: Any, params: Any, batch: Batch, **mode: Any) -> dict[str, PredictionSums]:
        """The sums of each loss over a corrupted batch.

        Args:
            model: of the kind `head`.
            params: its parameters.
            batch: corrupted, with the rows' numbers as `rows`.
            mode: `deterministic` and `rngs` of the model's call.
        """
        ...

    def samples(self, model: Any, params: Any, rows: dict[str, np.ndarray]) -> Iterable[str]:
        """Lines that show people what was learnt.

        Args:
            model: of the kind `head`.
            params: its parameters, on the host.
            rows: a batch of held-out rows.
        """
        ...
