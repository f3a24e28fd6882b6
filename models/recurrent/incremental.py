"""Incremental decoding of recurrent encoder-decoders: a hypothesis's state lies in the slot of its newest token."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ..checkpoints.tables import Params
from ..incremental import WithSource


class Kept(NamedTuple):
    """The cache: the decoder after each token, in the token's slot."""

    states: Any  # each layer's, each [B, slots, E]
    fed: Array  # [B, slots, F], what the next step reads
    positions: Array  # [B, slots] int32, position of the token in each slot


@dataclass(frozen=True)
class IncrementalRecurrent(WithSource):
    """A recurrent encoder-decoder as generation uses it (`train.generate.batch.IncrementalModel`).

    A hypothesis continues from the newest token of its history, so that reordering beams moves no states. All methods
    are pure functions, and can be traced.
    """

    def prepare(self, params: Params) -> Params:
        """Return the parameters as they are."""
        return params

    def start(self, prepared: Params, input_ids: Array, segment_ids: Array) -> Any:
        """Read sources: input_ids [B, S] int32; segment_ids [B, S] int32, 1 for tokens and 0 for padding."""
        return self.model.apply({"params": prepared}, input_ids, segment_ids, method="begin")

    def cache(self, rows: int, slots: int) -> Kept:
        """Return an empty cache."""
        c = self.config
        state = jnp.zeros((rows, slots, c.width), jnp.float32)
        layers = ((state,) * (2 if c.cell == "lstm" else 1),) * c.decoder_layers
        return Kept(layers, jnp.zeros((rows, slots, c.fed_width)), jnp.zeros((rows, slots), jnp.int32))

    def step(
        self, prepared: Params, memory: Any, cache: Kept, tokens: Array, positions: Array, places: Array, mask: Array
    ) -> tuple[Array, Kept, tuple[Array, ...]]:
        """Read one more token of each beam; see `IncrementalEncoderDecoder.step`.

        The attention is given once per layer, [B, 1, K, S] each, since all layers have the same; not at all without
        attention.
        """
        slots = mask.shape[2]
        earlier = mask & (places[..., None] != jnp.arange(slots)[None, None])
        newest = jnp.where(earlier, cache.positions[:, None], -1).argmax(axis=-1)
        rows, begins = jnp.arange(len(tokens))[:, None], (positions == 0)[:, None, None]

        def before(kept: Array, initial: Array) -> Array:
            return jnp.where(begins, initial, kept[rows, newest])

        states = jax.tree.map(lambda kept, new: before(kept, new[:, None]), cache.states, memory.layers)
        fed = before(cache.fed, jnp.zeros(()))
        variables = {"params": prepared}
        logits, after = self.model.apply(variables, memory, states, fed, tokens, method="read")

        def write(kept: Array, new: Array) -> Array:
            return kept.at[rows, places].set(new, mode="drop")

        at = write(cache.positions, jnp.broadcast_to(positions[:, None], places.shape))
        kept = Kept(jax.tree.map(write, cache.states, after.states), write(cache.fed, after.fed), at)
        attention = () if after.attention is None else (after.attention[:, None],) * self.config.decoder_layers
        return logits, kept, attention
