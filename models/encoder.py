"""The base of all token encoders: embeddings, layers, pooler."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from .family import EncoderConfig
from .layers.linear import Linear
from .layers.segments import Rows, Segments, gather_positions, row_numbers
from .layers.stack import run_layers


class Encoded(NamedTuple):
    """Output of an encoder."""

    hidden: Array  # [B, L, E], of the last layer; [B, X, E], of [CLS], if `cls_only`
    first: Array  # [B, E], of the last layer at the row's first token; [B, X, E] if `cls_positions` were given
    pooled: Array | None  # shaped as `first`; None without a pooler
    every_hidden: Array | None  # [N + 1, B, L, E], of the embeddings and each layer, if `every_layer`


def check_length(config: EncoderConfig, length: int) -> None:
    """Raise ValueError for rows of `length` tokens that are longer than the model supports."""
    if config.max_length is not None and length > config.max_length:
        raise ValueError(f"a row has {length} tokens, but the model has {config.max_length} positions")


class Encoder(nn.Module):
    """An encoder of tokens, with its pooler if `pooler` is on.

    A family's subclass creates `embeddings` and `layers` in its `setup`, and `pool` by `make_pooler`.
    """

    config: EncoderConfig
    pooler: bool = True

    def make_pooler(self) -> Linear:
        """Return the dense layer before the pooler's tanh."""
        c = self.config
        return Linear((c.width,), ("embed", "embed_out"), c.initializer, c.dtype, name="pooler")

    def __call__(
        self,
        input_ids: Array,
        segment_ids: Segments = None,
        position_ids: Array | None = None,
        token_type_ids: Array | None = None,
        *,
        cls_positions: Array | None = None,
        rows: Rows | None = None,
        deterministic: bool = True,
        every_layer: bool = False,
        cls_only: bool = False,
    ) -> Encoded:
        """Encode rows of tokens.

        Args:
            input_ids: [B, L] int32.
            segment_ids: [B, L] int32, which packed example each token belongs to, 0 for padding; None for one example
                that fills the row. Attention never crosses segments. A pair gives queries and keys their own.
            position_ids: [B, L] int32, position within the example, from 0; None counts along the row.
            token_type_ids: [B, L] int32, sentence A (0) or B (1); None for all A. Only for families that have them.
            cls_positions: [B, X] int32, position of each example's [CLS]; None for only the row's first token.
            rows: what determines, together with the "dropout" stream, what is dropped: [B] uint32, row numbers, or
                `ByExample` of the tokens; None numbers the rows from 0.
            deterministic: disable dropout.
            every_layer: also return the embeddings and every layer's hidden states.
            cls_only: let the last layer compute only [CLS], which is all that a classifier reads; the results are the
                same, except for the dropout mask.
        """
        c = self.config
        embeddings: Any = self.embeddings
        rows = row_numbers(rows, input_ids)
        at = jnp.zeros((len(input_ids), 1), jnp.int32) if cls_positions is None else cls_positions
        types = () if token_type_ids is None else (token_type_ids,)
        embedded = embeddings(input_ids, position_ids, *types, rows=rows, deterministic=deterministic)
        hidden, outputs = run_layers(
            self.layers,
            embedded,
            segment_ids,
            rows,
            count=c.layers,
            scan=c.scan_layers,
            remat=c.remat,
            deterministic=deterministic,
            every_layer=every_layer,
            last_positions=at if cls_only else None,
        )
        first = hidden if cls_only and not self.is_initializing() else gather_positions(hidden, at)
        first = first[:, 0] if cls_positions is None else first
        pooled = jnp.tanh(self.pool(first)) if self.pooler else None
        every_hidden = None if outputs is None else jnp.concatenate([embedded[None], outputs])
        return Encoded(hidden, first, pooled, every_hidden)
