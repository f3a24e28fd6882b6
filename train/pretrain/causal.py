"""Causal language modelling: predict each token from those before it (Radford et al. 2018, 3.1).

Rows are running text, cut at one length; attention may cross the boundaries of documents, as in GPT-3. Nothing is
masked or drawn: what is to be predicted is the text itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from ...data import DocumentStore, Tokenizer
from ...data.corpus.document_store import Split, Unit
from ...data.rows.running_text import RunningTextRows
from ...data.stream import RowSource
from ...models.heads.losses import PredictionSums
from ...models.heads.with_head import encoder_inputs
from ..errors import RunError
from .config import PretrainConfig
from .objective import Batch, LossSums, Network, Objective, Term

SHOWN = 4  # held-out texts
BEFORE = 24  # tokens shown before the model's own


@dataclass(frozen=True, eq=False)
class NextTokens(Objective):
    """The objective `causal`, with the loss "causal"."""

    tokenizer: Tokenizer
    across: bool
    head = "causal_lm"
    shown = ("causal_accuracy",)
    terms = (Term("causal"),)
    own_rows: ClassVar = "running text"
    units: ClassVar = ()
    text: ClassVar[Unit] = "paragraphs"

    @classmethod
    def create(cls, config: PretrainConfig, tokenizer: Tokenizer) -> Self:
        """See `ObjectiveClass.create`."""
        if "eos" not in tokenizer.special_ids:
            raise RunError(
                f"{config.tokenizer_folder}: a tokenizer without an end-of-text token, which separates documents for "
                "--objective causal. A byte-level BPE has one."
            )
        return cls(tokenizer, config.across_documents)

    def rows(self, store: DocumentStore, split: Split, **settings: Any) -> RowSource:
        """See `Objective.rows`."""
        return RunningTextRows(store, self.tokenizer, split, cross_documents=self.across, **settings)

    def networks(self, architecture: Any) -> tuple[Network, ...]:
        """Return the decoder, which predicts every token."""
        return (Network(architecture, "all"),)

    def corrupt(self, key: jax.Array, batch: Batch) -> Batch:
        """Return the batch as it is."""
        del key
        return batch

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Return the number of predictions."""
        return {"causal": batch["label_weights"].sum()}

    def losses(self, model: Any, params: Any, batch: Batch, **mode: Any) -> LossSums:
        """Compute the cross-entropy of the next tokens."""

        def loss(model: Any) -> Any:
            states = model.output_states(*encoder_inputs(model.config, batch), rows=batch["rows"], **options)
            return model.loss(states, batch["labels"], batch["label_weights"])

        options = {"deterministic": mode["deterministic"]}
        found = model.apply({"params": params}, rngs=mode.get("rngs"), method=loss)
        return {"causal": PredictionSums(found.loss, found.correct, found.weight)}

    def samples(self, model: Any, params: Any, rows: dict[str, np.ndarray]) -> Iterable[str]:
        """Show the beginnings of held-out rows, and after each the most probable next tokens where it goes on."""
        ids = rows["input_ids"][:SHOWN]
        if ids.shape[1] < 2:
            return

        @jax.jit
        def guess(params: Any, ids: jax.Array) -> jax.Array:
            return model.apply({"params": params}, ids).argmax(-1)

        guesses = np.asarray(guess(params, jnp.asarray(ids)))
        for row, own, segments in zip(ids, guesses, rows["segment_ids"], strict=False):
            length = int((segments > 0).sum())
            at = min(BEFORE, length - 1)
            if at < 1:
                continue
            text, next_token, right = (
                self.tokenizer.decode(tokens).strip() for tokens in (row[:at], own[at - 1 : at], row[at : at + 1])
            )
            yield f"{' '.join(text.split())} [{next_token}, {'ok' if next_token == right else f'for {right}'}]"
