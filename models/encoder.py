"""The bases of encoders, of tokens and of anything else: embeddings, layers, pooler."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from .family import EncoderConfig, StackConfig
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


class StackEncoder(nn.Module):
    """An encoder of embedded tokens, patches or the like, with its pooler if `pooler` is on.

    A family's subclass creates `embeddings` and `layers` in its `setup`, and `pool` by `make_pooler`; it overrides
    `enter`, `leave` and `layer_inputs` if it has something between the embeddings, the layers and the output.
    """

    config: StackConfig
    pooler: bool = True

    def make_pooler(self) -> Linear:
        """Return the dense layer before the pooler's tanh."""
        c = self.config
        return Linear((c.width,), ("embed", "embed_out"), c.initializer, c.dtype, name="pooler")

    def enter(self, embedded: Array) -> Array:
        """Compute the input of the first layer [B, L, E] from the embeddings."""
        return embedded

    def leave(self, hidden: Array) -> Array:
        """Compute the encoder's output from the last layer's."""
        return hidden

    def layer_inputs(self, position_ids: Array | None) -> tuple[Any, ...]:
        """Return what every layer gets in addition to the hidden states, the segments and the row numbers."""
        del position_ids
        return ()

    def encode(
        self,
        embedded: Array,
        segment_ids: Segments,
        position_ids: Array | None,
        *,
        cls_positions: Array | None,
        rows: Rows,
        deterministic: bool,
        every_layer: bool = False,
        cls_only: bool = False,
    ) -> Encoded:
        """Encode rows of embedded tokens [B, L, table width]; the other arguments are those of `Encoder`."""
        c = self.config
        at = jnp.zeros((len(embedded), 1), jnp.int32) if cls_positions is None else cls_positions
        entered = self.enter(embedded)
        # A window depends on a query's place in the row, so that a layer that has one computes every token.
        alone = cls_only and (c.kinds is None or c.kinds[-1].get("window") is None)
        hidden, outputs = run_layers(
            self.layers,
            entered,
            segment_ids,
            rows,
            *self.layer_inputs(position_ids),
            count=c.layers,
            scan=c.scan_layers,
            remat=c.remat,
            deterministic=deterministic,
            kinds=c.kinds,
            sets=c.sets,
            every_layer=every_layer,
            last_positions=at if alone else None,
        )
        if cls_only and not (alone and not self.is_initializing()):
            hidden = gather_positions(hidden, at)
        hidden = self.leave(hidden)
        first = hidden if cls_only else gather_positions(hidden, at)
        first = first[:, 0] if cls_positions is None else first
        pooled = jnp.tanh(self.pool(first)) if self.pooler else None
        every_hidden = None if outputs is None else jnp.concatenate([entered[None], outputs[:-1], hidden[None]])
        return Encoded(hidden, first, pooled, every_hidden)


class Encoder(StackEncoder):
    """An encoder of tokens."""

    config: EncoderConfig  # pyright: ignore[reportIncompatibleVariableOverride] (modules are frozen)

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
        embeddings: Any = self.embeddings
        rows = row_numbers(rows, input_ids)
        types = () if token_type_ids is None else (token_type_ids,)
        return self.encode(
            embeddings(input_ids, position_ids, *types, rows=rows, deterministic=deterministic),
            segment_ids,
            position_ids,
            cls_positions=cls_positions,
            rows=rows,
            deterministic=deterministic,
            every_layer=every_layer,
            cls_only=cls_only,
        )
