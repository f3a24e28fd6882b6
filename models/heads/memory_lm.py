"""A language model with a memory: a decoder that reads a text in segments, and an adaptive softmax."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ..layers.relative_attention import Biases
from ..layers.segments import row_numbers
from .losses import IGNORED_LABEL, WeightedSum


class Memory(NamedTuple):
    """What was read before: each layer's last inputs. Slots are in the order of the text, the newest last."""

    hidden: Array  # [N, B, M, E], without gradient
    segment_ids: Array  # [B, M] int32, 0 for an empty slot


def empty_memory(config: Any, rows: int, slots: int) -> Memory:
    """Return a memory without tokens."""
    hidden = jnp.zeros((config.layers, rows, slots, config.width), config.dtype)
    return Memory(hidden, jnp.zeros((rows, slots), jnp.int32))


class MemoryLanguageModel(nn.Module):
    """Base of a family's model, which creates `encoder` and `head`, an `AdaptiveSoftmax`, in its `setup`."""

    config: Any

    def __call__(self, input_ids: Array) -> Array:
        """Compute the log-probabilities of each next token, [B, L, V] float32, of texts [B, L] int32 from the start."""
        return self.log_probabilities(self.output_states(input_ids))

    def read(
        self,
        input_ids: Array,
        memory: Memory,
        segment_ids: Array | None = None,
        *,
        rows: Array | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, Memory]:
        """Read the next tokens of texts.

        Args:
            input_ids: [B, L] int32.
            memory: of what was read before.
            segment_ids: [B, L] int32, 0 for padding; tokens attend to those of their own segment, in the memory too.
                None for ones.
            rows: [B] uint32, row numbers, which determine with the "dropout" stream what is dropped; None for 0, 1, ...
            deterministic: disable dropout.

        Returns:
            (the last layer's output [B, L, E], the memory after these tokens, of as many slots)
        """
        segment_ids = jnp.ones(input_ids.shape, jnp.int32) if segment_ids is None else segment_ids
        numbers: Any = row_numbers(rows, input_ids)
        encoder: Any = self.encoder
        return encoder.read(input_ids, memory, segment_ids, numbers, deterministic=deterministic)[:2]

    def output_states(
        self,
        input_ids: Array,
        segment_ids: Array | None = None,
        *,
        rows: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Read whole texts, with no memory before them; as `read`, but [B, L, E] alone."""
        none = self.empty_memory(len(input_ids), 0)
        return self.read(input_ids, none, segment_ids, rows=rows, deterministic=deterministic)[0]

    def log_probabilities(self, states: Array) -> Array:
        """Compute the log-probabilities of all words, [..., V] float32, from states [..., E] of `read`."""
        head: Any = self.head
        return head.log_probabilities(states, self.encoder.embeddings)

    def token_losses(self, states: Array, labels: Array) -> Array:
        """Compute -log p of the tokens after others: states [B, L, E] and labels [B, L] int -> [B, L] float32."""
        head: Any = self.head
        return head.token_losses(states, labels, self.encoder.embeddings)

    def loss(self, states: Array, labels: Array, label_weights: Array | None = None) -> WeightedSum:
        """Compute the sum of the losses of next tokens; `losses.IGNORED_LABEL` has weight 0."""
        ignored = labels == IGNORED_LABEL
        weights = jnp.ones(labels.shape, jnp.float32) if label_weights is None else label_weights
        weights = jnp.where(ignored, 0.0, weights)
        losses = self.token_losses(states, jnp.where(ignored, 0, labels))
        return WeightedSum((losses * weights).sum(), weights.sum())

    @nn.nowrap
    def empty_memory(self, rows: int, slots: int | None = None) -> Memory:
        """Return an empty memory of `slots` tokens for each of `rows` rows; None for the config's number."""
        return empty_memory(self.config, rows, self.config.memory if slots is None else slots)

    def embed(self, input_ids: Array) -> Array:
        """Compute the input of the first layer [B, L, E] of tokens [B, L]."""
        encoder: Any = self.encoder
        return encoder.embed(input_ids)

    def biases(self) -> Biases | None:
        """Return u and v; None if each layer has its own."""
        encoder: Any = self.encoder
        return encoder.biases()
