"""Masking of spans as in SpanBERT, on the device and inside the step (Joshi et al. 2020, 3.1; fairseq/data/masking.py).

An example's budget is `rate * tokens`, rounded up, special tokens not counted. A span starts at the word of a token
drawn from those that are not yet masked and goes on for a number of words, geometric with p = 0.2 on 1 to 10, over
words that are masked already. The last span ends where the budget does, within a word too. Spans that overlap or touch
are one: the tokens beside a span are never masked. One draw for each decides what becomes of its tokens: 80 % [MASK],
10 % random tokens, 10 % unchanged.

Random tokens are drawn from the row's own text, so that they are distributed as the corpus's; the original draws them
from all of the corpus. Special tokens within a text, such as [UNK], are neither masked nor boundaries.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ...data.rows.sentence_pairs import most_examples
from .masking import UNIT_LENGTHS, Masked, replace


class MaskedSpanTokens(NamedTuple):
    """A batch after masking; what predicts a token from the boundaries of its span is 0 where the weight is."""

    masked: Masked
    left: jax.Array  # [B, P] int32, position of the token before the span
    right: jax.Array  # [B, P] int32, position of the token after it
    offsets: jax.Array  # [B, P] int32, place of the prediction in the span, from 0
    weights: jax.Array  # [B, P] float32, 1 for a token of a span with two boundaries in its text


@dataclass(frozen=True, eq=False)
class SpanMasking:
    """SpanBERT's way of masking tokens.

    Args:
        rate: fraction of the tokens to predict, in (0, 1].
        mask_id: id of [MASK].
        special: [V] bool, the special tokens.
        continuation: [V] bool, tokens that continue the word before them.
        targets: number of a span's first tokens that are predicted from its boundaries.
        keep: fraction of the spans whose tokens are not changed.
        random: fraction of the spans whose tokens become random ones; the rest becomes [MASK].
    """

    rate: float
    mask_id: int
    special: np.ndarray
    continuation: np.ndarray
    targets: int = 15
    keep: float = 0.1
    random: float = 0.1

    def slots(self, length: int) -> int:
        """Return the number of prediction slots of a row: the budgets of its examples are rounded up one by one."""
        return min(length, math.floor(self.rate * length) + most_examples(length))

    def __call__(
        self, key: jax.Array, input_ids: jax.Array, segment_ids: jax.Array, row_ids: jax.Array
    ) -> MaskedSpanTokens:
        """Mask a batch; arguments as for `Masking`."""
        return jax.vmap(self._row, in_axes=(None, 0, 0, 0))(key, input_ids, segment_ids, row_ids)

    def _row(self, key: jax.Array, input_ids: jax.Array, segment_ids: jax.Array, row_id: jax.Array) -> MaskedSpanTokens:
        key = jax.random.fold_in(jax.random.fold_in(key, row_id[0]), row_id[1])
        order_key, length_key, action_key, token_key = jax.random.split(key, 4)
        length = input_ids.shape[0]
        places = jnp.arange(length, dtype=jnp.int32)
        text = (segment_ids > 0) & ~jnp.asarray(self.special)[input_ids]
        before = jnp.concatenate([jnp.zeros(1, bool), text[:-1]])
        after = jnp.concatenate([text[1:], jnp.zeros(1, bool)])
        chosen = self._choose(order_key, length_key, input_ids, segment_ids, text, before)

        starts = chosen & ~jnp.concatenate([jnp.zeros(1, bool), chosen[:-1]])
        ends = chosen & ~jnp.concatenate([chosen[1:], jnp.zeros(1, bool)])
        first = jax.lax.cummax(jnp.where(starts, places, 0))  # of each token's span
        last = jax.lax.cummin(jnp.where(ends, places, length - 1), reverse=True)
        candidates = jnp.sort(jnp.where(text, places, length))
        drawn = jax.random.randint(token_key, (length,), 0, jnp.maximum(text.sum(), 1))
        other = input_ids[jnp.minimum(candidates[drawn], length - 1)]
        fate = jax.random.uniform(action_key, (length,))[first]
        masked = replace(self, self.slots(length), input_ids, chosen, fate, other)

        bounded = chosen & before[first] & after[last] & (places - first < self.targets)
        used = (masked.weights > 0) & bounded[masked.positions]

        def at(values: jax.Array) -> jax.Array:
            return jnp.where(used, values[masked.positions], 0).astype(jnp.int32)

        return MaskedSpanTokens(masked, at(first - 1), at(last + 1), at(places - first), used.astype(jnp.float32))

    def _choose(
        self,
        order_key: jax.Array,
        length_key: jax.Array,
        input_ids: jax.Array,
        segment_ids: jax.Array,
        text: jax.Array,
        before: jax.Array,
    ) -> jax.Array:
        """Choose the tokens of spans until every example's budget is full: [L] bool."""
        length = input_ids.shape[0]
        budgets = np.array([math.ceil(count * self.rate) for count in range(length + 1)], np.int32)
        counts = jnp.zeros(length + 1, jnp.int32).at[segment_ids].add(text.astype(jnp.int32))
        begins = text & ~before
        stretch = jnp.cumsum(begins)  # unbroken text, which a span does not leave
        word = jnp.cumsum(begins | (text & ~jnp.asarray(self.continuation)[input_ids]))
        priority = jax.random.uniform(order_key, (length,))
        shares = jnp.asarray(UNIT_LENGTHS["span"], jnp.float32)
        words = 1 + jax.random.choice(length_key, len(UNIT_LENGTHS["span"]), (length,), p=shares)

        def open_tokens(chosen: jax.Array, left: jax.Array) -> jax.Array:
            return text & ~chosen & (left[segment_ids] > 0)

        def unfinished(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
            return open_tokens(*carry).any()

        def take(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            chosen, left = carry
            anchor = jnp.argmax(jnp.where(open_tokens(chosen, left), priority, -1.0))
            ahead = word - word[anchor]
            new = text & ~chosen & (stretch == stretch[anchor]) & (ahead >= 0) & (ahead < words[anchor])
            new &= jnp.cumsum(new) <= left[segment_ids[anchor]]
            return chosen | new, left.at[segment_ids[anchor]].add(-new.sum())

        return jax.lax.while_loop(unfinished, take, (jnp.zeros(length, bool), jnp.asarray(budgets)[counts]))[0]
