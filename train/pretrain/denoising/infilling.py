"""BART's noise: text infilling and the permutation of sentences, on the device (Lewis et al. 2020, 2.2).

As fairseq's denoising_dataset.py does it. A row is `<s> text </s>`. First all its sentences are put in a random order.
Then words are masked until the budget is full, `rate` of the words, rounded up: spans of a number of words drawn from a
Poisson distribution, the last cut to the budget; each becomes one [MASK], but a tenth of them one random token. A span
starts at a word drawn without replacement and covers the words that follow; it may run into another, whose [MASK] is
then covered too, but not over a special token. Spans of no words are [MASK]s inserted between any two tokens, of which
a tenth, rounded up, are random tokens.

Random tokens are not special ones. Spans of no words that would make a row longer than it can be are left out.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MEAN_SPAN = 3.0  # words, the Poisson distribution's mean (3.5 in the released command)
RANDOM = 0.1  # of the spans
_MOST_WORDS = 24  # of a span; a Poisson draw of mean 3 is longer once in 1e15


class Spans(NamedTuple):
    """The spans that fill a budget."""

    lengths: jax.Array  # [N] int32, in words, those of at least one word first, then zeros
    inserted: jax.Array  # [] int32, number of spans of no words among those drawn


def draw_spans(uniforms: jax.Array, budget: jax.Array) -> Spans:
    """Draw spans until they have `budget` words; the last is cut.

    Args:
        uniforms: [N] float32 in [0, 1), one for each span.
        budget: [] int32, at most N / 2.
    """
    probabilities = [math.exp(-MEAN_SPAN) * MEAN_SPAN**k / math.factorial(k) for k in range(_MOST_WORDS)]
    edges = jnp.asarray(np.cumsum(probabilities), jnp.float32)
    lengths = jnp.searchsorted(edges, uniforms, side="right").astype(jnp.int32)
    ends = jnp.cumsum(lengths)
    drawn = (ends - lengths < budget) & (budget > 0)  # up to the one that fills it
    lengths = jnp.where(drawn, jnp.minimum(lengths, budget - (ends - lengths)), 0)
    inserted = (drawn & (lengths == 0)).sum(dtype=jnp.int32)
    order = jnp.argsort(lengths == 0, stable=True)
    return Spans(lengths[order], inserted)


@dataclass(frozen=True, eq=False)
class Infilling:
    """BART's noise.

    Attributes:
        rate: fraction of the words to mask.
        mask_id: id of [MASK].
        special: [V] bool, the special tokens.
        continuation: [V] bool, tokens that continue the word before them.
        stops: [V] bool, tokens that end a sentence, unless the token before does.
    """

    rate: float
    mask_id: int
    special: np.ndarray
    continuation: np.ndarray
    stops: np.ndarray

    def __call__(self, key: jax.Array, ids: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Corrupt a row.

        Args:
            key: key of the row.
            ids: [L] int32, `<s> text </s>`, then padding.
            length: [] int32, number of tokens.

        Returns:
            ([L] int32, its length [] int32)
        """
        order_key, infill_key = jax.random.split(key)
        return self.infill(infill_key, self.permute(jax.random.uniform(order_key, ids.shape), ids, length), length)

    def permute(self, uniforms: jax.Array, ids: jax.Array, length: jax.Array) -> jax.Array:
        """Put the sentences of a row in a random order: that of [L] `uniforms`, one for each sentence."""
        places = jnp.arange(len(ids))
        inside = (places > 0) & (places < length - 1)
        stops = inside & (jnp.asarray(self.stops)[ids] | (places == length - 2))
        ends = stops & ~jnp.concatenate([jnp.zeros(1, bool), stops[:-1]])
        sentence = jnp.cumsum(ends) - ends.astype(jnp.int32)  # number of each token's sentence
        # What follows the last end stays there, as do <s> and </s>.
        rank = jnp.where(inside & (sentence < ends.sum()), uniforms[sentence], 2.0)
        rank = jnp.where(places == 0, -1.0, rank)
        return ids[jnp.argsort(rank, stable=True)]

    def infill(self, key: jax.Array, ids: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mask words of a row. Arguments and results as for the call."""
        start_key, length_key, fate_key, token_key, insert_key = jax.random.split(key, 5)
        count = len(ids)
        places = jnp.arange(count)
        text = (places > 0) & (places < length - 1) & ~jnp.asarray(self.special)[ids]
        begins = text & ~(jnp.asarray(self.continuation)[ids] & jnp.concatenate([jnp.zeros(1, bool), text[:-1]]))
        # Special tokens are barriers: the numbers of the words after one are beyond the reach of those before.
        barriers = jnp.cumsum(~text) * (count + _MOST_WORDS)
        word = jnp.cumsum(begins) + barriers
        words = begins.sum(dtype=jnp.int32)
        budgets = np.array([math.ceil(round(number * self.rate, 6)) for number in range(count + 1)], np.int32)
        spans = draw_spans(jax.random.uniform(length_key, (2 * count,)), jnp.asarray(budgets)[words])
        priority = jnp.where(begins, jax.random.uniform(start_key, (count,)), 2.0)
        rank = jnp.argsort(jnp.argsort(priority))
        own = jnp.where(begins, spans.lengths[:count][rank], 0)  # length of the span that starts at each token

        reach = jax.lax.cummax(jnp.where(own > 0, word + own, 0))
        before = jnp.concatenate([jnp.zeros(1, reach.dtype), reach[:-1]])
        kept = (places < length) & ~(text & (word < before))
        masked = kept & (own > 0)
        choices = np.flatnonzero(~self.special)
        drawn = jnp.asarray(choices, ids.dtype)[jax.random.randint(token_key, (2, count), 0, len(choices))]
        fate = jax.random.uniform(fate_key, (count,)) < RANDOM
        tokens = jnp.where(masked, jnp.where(fate, drawn[0], self.mask_id), ids)

        left = kept.sum(dtype=jnp.int32)
        inserted = jnp.minimum(spans.inserted, count - left)
        total = left + inserted
        between = (places > 0) & (places < total - 1)
        order = jnp.argsort(jnp.argsort(jnp.where(between, jax.random.uniform(insert_key, (count,)), 2.0)))
        new = between & (order < inserted)
        randoms = jnp.ceil(inserted.astype(jnp.float32) * RANDOM).astype(jnp.int32)
        fresh = jnp.where(order < randoms, drawn[1], self.mask_id)
        compact = jnp.zeros(count, ids.dtype).at[jnp.where(kept, jnp.cumsum(kept) - 1, count)].set(tokens, mode="drop")
        old = compact[jnp.clip(jnp.cumsum(~new) - 1, 0, count - 1)]
        return jnp.where(new, fresh, old), total
