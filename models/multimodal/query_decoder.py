"""A decoder of query vectors, which are what its inputs are told apart by (Carion et al. 2020, A.4 and figure 10)."""

from functools import partial
from typing import Any

import flax.linen as nn
from jax import Array

from ..layers.attention import Attention
from ..layers.dropout import Dropout
from ..layers.feed_forward import FeedForward
from ..layers.norms import LayerNorm
from ..layers.segments import Rows, Segments


class DecoderBlock(nn.Module):
    """One layer: self-attention, attention to the memory, feed-forward, each added and then normalised (post-norm)."""

    config: Any  # UniT's

    def setup(self) -> None:
        c = self.config
        attention = partial(
            Attention, c.width, c.heads, c.attention_dropout, c.initializer, c.dtype, c.attention_implementation
        )
        norm = partial(LayerNorm, c.norm_epsilon, c.dtype)
        self.attention, self.cross_attention = attention(), attention()
        self.attention_norm, self.cross_attention_norm, self.feed_forward_norm = norm(), norm(), norm()
        self.feed_forward = FeedForward(c.feed_forward, c.activation, c.initializer, c.dtype, c.dropout)
        self.drop = Dropout(c.dropout)

    def __call__(
        self,
        hidden: Array,
        queries: Array,
        memory: Array,
        memory_places: Array,
        cross_segments: Segments,
        rows: Rows,
        *,
        deterministic: bool,
    ) -> Array:
        """Transform hidden states [B, Q, E] -> [B, Q, E]; queries are [1, Q, E], the memory [B, S, E]."""
        mode: dict[str, Any] = {"rows": rows, "deterministic": deterministic}
        drop = partial(self.drop, **mode)
        attended = self.attention(hidden, None, places=queries, **mode)
        hidden = self.attention_norm(hidden + drop(attended))
        attended = self.cross_attention(
            hidden, cross_segments, places=queries, memory=memory, memory_places=memory_places, **mode
        )
        hidden = self.cross_attention_norm(hidden + drop(attended))
        return self.feed_forward_norm(hidden + drop(self.feed_forward(hidden, **mode)))
