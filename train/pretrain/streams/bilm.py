"""A language model of both directions, by ELMo: predict each word from those before it, and from those after it.

Words are read as characters, and predicted among the vocabulary's (Peters et al. 2018, 3.1). Rows are streams of text,
and the state of both directions is carried from batch to batch, as in bilm-tf; it is part of the training state, so
that a resumed run equals an uninterrupted one. Evaluation begins with a state of zeros.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from ....data import DocumentStore, Tokenizer
from ....data.corpus.document_store import Split, Unit
from ....data.rows.streams import StreamRows
from ....data.stream import RowSource
from ....models.heads.losses import PredictionSums
from ....models.recurrent.elmo import character_ids
from ...errors import RunError
from ..config import PretrainConfig
from ..objective import Batch, LossSums, Objective, Term


@dataclass(frozen=True, eq=False)
class BothDirections(Objective):
    """The objective `bilm`, with the losses "forward" and "backward", each of half the weight."""

    tokenizer: Tokenizer
    columns: int
    head = "bilm"
    shown = ("forward_loss", "backward_loss")
    terms = (Term("forward", 0.5), Term("backward", 0.5))
    own_rows: ClassVar = "streams of text"
    units: ClassVar = ()
    text: ClassVar[Unit] = "paragraphs"

    @classmethod
    def create(cls, config: PretrainConfig, tokenizer: Tokenizer) -> Self:
        """See `ObjectiveClass.create`."""
        if tokenizer.kind != "words":
            raise RunError("--objective bilm reads whole words: give a tokenizer of --kind words, or none.")
        if len(config.plan) != 1:
            raise RunError("--objective bilm: one phase and one batch size, of which each row carries its state.")
        return cls(tokenizer, config.plan[0].rows)

    def rows(self, store: DocumentStore, split: Split, **settings: Any) -> RowSource:
        """See `Objective.rows`."""
        return StreamRows(store, self.tokenizer, split, columns=self.columns, cross_documents=True, **settings)

    def corrupt(self, key: jax.Array, batch: Batch) -> Batch:
        """Add the words before, and the weight of predicting them."""
        del key
        ids, there = batch["input_ids"], (batch["segment_ids"] > 0).astype(jnp.float32)
        before = jnp.pad(ids[:, :-1], ((0, 0), (1, 0)))
        return {**batch, "before": before, "before_weights": there.at[:, 0].set(0.0)}

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Return the number of predictions in each direction."""
        return {"forward": batch["label_weights"].sum(), "backward": batch["before_weights"].sum()}

    def memory(self, model: Any) -> Batch:
        """See `Objective.memory`."""
        return _named(model.config, self.columns)

    def losses_and_memory(
        self, model: Any, params: Any, batch: Batch, memory: Batch, **mode: Any
    ) -> tuple[LossSums, Batch]:
        """See `Objective.losses_and_memory`."""
        ids = batch["input_ids"]
        table = jnp.asarray(self._characters(model.config.most_characters))
        characters = jnp.where((batch["segment_ids"] > 0)[..., None], table[ids], 0)
        c = model.config
        state = tuple(
            tuple((memory[f"{side}_{layer}_output"], memory[f"{side}_{layer}_cell"]) for layer in range(c.layers))
            for side in SIDES
        )
        found, after = model.apply(
            {"params": params},
            characters,
            state,
            (batch["labels"], batch["before"]),
            (batch["label_weights"], batch["before_weights"]),
            rows=batch["rows"],
            deterministic=mode["deterministic"],
            rngs=mode.get("rngs"),
            method="losses",
        )
        kept = {
            f"{side}_{layer}_{name}": jax.lax.stop_gradient(part)
            for side, layers in zip(SIDES, after, strict=True)
            for layer, parts in enumerate(layers)
            for name, part in zip(PARTS, parts, strict=True)
        }
        sums = {
            name: PredictionSums(one.loss, one.correct, one.weight)
            for name, one in zip(("forward", "backward"), found, strict=True)
        }
        return dict(sums), kept

    def samples(self, model: Any, params: Any, rows: dict[str, np.ndarray]) -> Iterable[str]:
        """Yield nothing: what it has learnt are vectors."""
        del model, params, rows
        return ()

    def _characters(self, most: int) -> np.ndarray:
        """Return the characters of every word of the vocabulary, [V, most] int32."""
        special = {self.tokenizer.eos_id: "</S>"}
        words = [special.get(number, token) or " " for number, token in enumerate(self.tokenizer.tokens)]
        return character_ids([words], most)[0]


SIDES, PARTS = ("ahead", "back"), ("output", "cell")


def _named(c: Any, rows: int) -> Batch:
    """Return a state of zeros by names, each [rows, ...]."""
    sizes = {"output": c.width, "cell": c.cells}
    return {
        f"{side}_{layer}_{name}": jnp.zeros((rows, sizes[name]))
        for side in SIDES
        for layer in range(c.layers)
        for name in PARTS
    }
