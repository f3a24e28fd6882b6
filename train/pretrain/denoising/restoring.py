"""The base of the objectives of encoder-decoders: the decoder writes what the encoder's input lacks."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ....data import Tokenizer
from ....models.heads.losses import PredictionSums, WeightedSum
from ..objective import Batch, LossSums, Objective

SHOWN, LONGEST = 3, 48  # texts to show, and tokens of each
INPUTS = (
    "input_ids", "segment_ids", "position_ids", "decoder_input_ids", "decoder_segment_ids", "decoder_position_ids",
)  # fmt: skip


def both_sides(
    source: jax.Array, source_length: jax.Array, target: jax.Array, target_length: jax.Array, start: int, pad: int
) -> Batch:
    """Return the arrays of one row that a model takes.

    Args:
        source: [S] int32, the encoder's input.
        source_length: [] int32, number of its tokens; what follows them counts for nothing.
        target: [T] int32, the labels.
        target_length: [] int32, number of the labels.
        start: first token of the decoder's input, which is the target one token later.
        pad: padding token.
    """
    found: Batch = {}
    shifted = jnp.concatenate([jnp.full(1, start, target.dtype), target[:-1]])
    for prefix, ids, length in (("", source, source_length), ("decoder_", shifted, target_length)):
        places = jnp.arange(len(ids), dtype=jnp.int32)
        own = places < length
        found[f"{prefix}input_ids"] = jnp.where(own, ids, pad)
        found[f"{prefix}segment_ids"] = own.astype(jnp.int32)
        found[f"{prefix}position_ids"] = jnp.where(own, places, 0)
    used = jnp.arange(len(target)) < target_length
    return found | {"labels": jnp.where(used, target, pad), "label_weights": used.astype(jnp.float32)}


def row_keys(key: jax.Array, row_ids: jax.Array) -> jax.Array:
    """Return a key for each row, of its own numbers [B, 2] uint32."""
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(jax.random.fold_in)(fold(key, row_ids[:, 0]), row_ids[:, 1])


@dataclass(frozen=True, eq=False)
class Restoring(Objective):
    """An objective with one loss, the cross-entropy of the target's tokens.

    Attributes:
        tokenizer: the tokenizer.
        z_loss: weight of the z-loss in training, see `losses.projected_sums`.
        start: first token of the decoder's input.
    """

    tokenizer: Tokenizer
    z_loss: float
    start: int
    name: ClassVar[str]
    """of the loss"""
    head = "generation"

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Return the number of the target's tokens, as t5x and fairseq divide by (mesh TensorFlow's: all positions)."""
        return {self.name: batch["label_weights"].sum()}

    def losses(self, model: Any, params: Any, batch: Batch, **mode: Any) -> LossSums:
        """Compute the cross-entropy of the target, with the z-loss in training, and "nll" without."""
        variables = {"params": params}
        inputs = (batch[name] for name in INPUTS)
        states = model.apply(variables, *inputs, rows=batch["rows"], method="output_states", **mode)
        z_loss = 0.0 if mode.get("deterministic") else self.z_loss
        labels = (batch["labels"], batch["label_weights"])
        sums = model.apply(variables, [states], *labels, z_loss=z_loss, method="loss")
        found: LossSums = {self.name: PredictionSums(sums.loss, sums.correct, sums.weight)}
        return found | {"nll": WeightedSum(sums.nll, sums.weight)} if self.z_loss else found

    def samples(self, model: Any, params: Any, rows: dict[str, np.ndarray]) -> Iterable[str]:
        """Show corrupted texts, and the target as the model continues each of its beginnings."""

        @jax.jit
        def guess(params: Any, batch: Batch) -> tuple[Batch, jax.Array]:
            batch = self.corrupt(jax.random.key(0), batch)
            logits = model.apply({"params": params}, *(batch[name] for name in INPUTS))
            return batch, logits.argmax(-1)

        batch, guesses = jax.device_get(guess(params, {name: rows[name][:SHOWN] for name in rows}))
        for row, own in enumerate(guesses):
            source = batch["input_ids"][row][batch["segment_ids"][row] > 0][:LONGEST]
            used = batch["label_weights"][row] > 0
            if not used.any():
                continue
            texts = (source, batch["labels"][row][used][:LONGEST], own[used][:LONGEST])
            shown, target, written = (" ".join(self.tokenizer.decode(ids).split()) for ids in texts)
            yield f"  {shown} → {written} (for {target})"
