"""A language model: a decoder and the products with its word embeddings that predict the next token."""

from typing import Any

import flax.linen as nn
from jax import Array

from ..family import EncoderConfig
from ..incremental import IncrementalDecoder
from ..layers.segments import Rows, Segments, row_numbers
from .losses import SmoothedSums, cross_entropy, projected_sums


class CausalLanguageModel(nn.Module):
    """A decoder, whose word embeddings are `embeddings.word`, with logits of the next token.

    Attributes:
        config: config of the decoder.
        parts: the family's `EncoderParts`.
    """

    config: EncoderConfig
    parts: Any

    def setup(self) -> None:
        self.encoder = self.parts.encoder(self.config, pooler=False)

    def __call__(
        self,
        input_ids: Array,
        segment_ids: Segments = None,
        position_ids: Array | None = None,
        *,
        rows: Rows | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Compute the logits of each next token, [B, L, V] float32. Arguments as for `Encoder`."""
        states = self.output_states(input_ids, segment_ids, position_ids, rows=rows, deterministic=deterministic)
        return self.encoder.embeddings.word.attend(states)

    def output_states(
        self,
        input_ids: Array,
        segment_ids: Segments = None,
        position_ids: Array | None = None,
        *,
        rows: Rows | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Compute the states whose products with the word embeddings are the logits, [B, L, E]."""
        encoder: Any = self.encoder
        return encoder(input_ids, segment_ids, position_ids, rows=rows, deterministic=deterministic).hidden

    def loss(self, states: Array, labels: Array, label_weights: Array | None = None) -> SmoothedSums:
        """Compute the losses of the next tokens without storing all logits, by `losses.projected_sums`.

        Args:
            states: [B, L, E], by `output_states`.
            labels: [B, L] int32, the token after each; `losses.IGNORED_LABEL` has weight 0.
            label_weights: [B, L], or None for ones.
        """
        return projected_sums((states,), self.encoder.embeddings.word.embedding, labels, label_weights)

    def token_losses(self, states: Array, labels: Array) -> Array:
        """Compute -log p of single tokens: states [..., E] and labels [...] int -> [...] float32."""
        return cross_entropy(self.encoder.embeddings.word.attend(states), labels)[0]

    def embed(self, input_ids: Array, position_ids: Array | None = None) -> Array:
        """Compute the input of the first layer [B, L, E] of tokens [B, L] at positions [B, L], None for 0, 1, ..."""
        encoder: Any = self.encoder
        rows = row_numbers(None, input_ids)
        return encoder.enter(encoder.embeddings(input_ids, position_ids, rows=rows, deterministic=True))

    def last_scores(self, hidden: Array) -> Array:
        """Compute logits [..., V] float32 from the last layer's output [..., E]."""
        encoder: Any = self.encoder
        return encoder.embeddings.word.attend(encoder.leave(hidden))

    @nn.nowrap
    def incremental(self) -> IncrementalDecoder:
        """Return the model for incremental decoding, one token at a time."""
        decoder = self.parts.encoder(self.config, pooler=False)
        return IncrementalDecoder(self, decoder.bind({}).layers.clone(parent=None))
