"""Causal language modelling with a memory: each row sees the hidden states of the text before it (Dai et al. 2019).

A batch goes on where the one before stopped (`StreamRows`), and the model's memory after a batch is its memory before
the next. It is part of the training state, so that a resumed run equals an uninterrupted one. Evaluation begins with an
empty memory, and carries it through the held-out text.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax.numpy as jnp

from ....data import DocumentStore, Tokenizer
from ....data.corpus.document_store import Split
from ....data.rows.streams import StreamRows
from ....data.stream import RowSource
from ....models.heads.losses import LossSum
from ...errors import RunError
from ..causal import NextTokens
from ..config import PretrainConfig
from ..objective import Batch, LossSums


@dataclass(frozen=True, eq=False)
class NextTokensWithMemory(NextTokens):
    """The objective `causal+memory`, with the loss "causal"."""

    columns: int
    slots: int | None
    shown = ()
    own_rows: ClassVar = "streams of text"

    @classmethod
    def create(cls, config: PretrainConfig, tokenizer: Tokenizer) -> Self:
        """See `ObjectiveClass.create`."""
        if len(config.plan) != 1:
            raise RunError("--objective causal+memory: one phase and one batch size, of which each row has its memory.")
        plain = NextTokens.create(config, tokenizer)
        return cls(plain.tokenizer, plain.across, config.plan[0].rows, config.memory)

    def rows(self, store: DocumentStore, split: Split, **settings: Any) -> RowSource:
        """See `Objective.rows`."""
        streams = {"columns": self.columns, "cross_documents": self.across}
        return StreamRows(store, self.tokenizer, split, **streams, **settings)

    def memory(self, model: Any) -> Batch:
        """See `Objective.memory`."""
        return _by_rows(model.empty_memory(self.columns, self.slots))

    def losses_and_memory(
        self, model: Any, params: Any, batch: Batch, memory: Batch, **mode: Any
    ) -> tuple[LossSums, Batch]:
        """See `Objective.losses_and_memory`."""

        def run(model: Any) -> Any:
            before = model.empty_memory(1, 0)._replace(**{**memory, "hidden": jnp.swapaxes(memory["hidden"], 0, 1)})
            states, after = model.read(
                batch["input_ids"],
                before,
                batch["segment_ids"],
                rows=batch["rows"],
                deterministic=mode["deterministic"],
            )
            return model.loss(states, batch["labels"], batch["label_weights"]), after

        (loss, weight), after = model.apply({"params": params}, rngs=mode.get("rngs"), method=run)
        return {"causal": LossSum(loss, weight)}, _by_rows(after)


def _by_rows(memory: Any) -> Batch:
    """Return a memory as arrays [B, ...], as those of a batch."""
    return {"hidden": jnp.swapaxes(memory.hidden, 0, 1), "segment_ids": memory.segment_ids}
