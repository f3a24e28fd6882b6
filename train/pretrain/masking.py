"""Masking of tokens, on the device and inside the step (Devlin et al. 2018, 3.1 and A.1).

Every row draws from a key folded with the row's own numbers, so neither the mesh, nor gradient accumulation, nor the
number of hosts changes what is masked. Dynamic and static masking are the same code: the data set decides whether a
row comes back under new numbers in the next epoch (dynamic) or under its old ones (static, with a number of copies).

By BERT's rules all tokens but special ones are maskable, and a row's budget is exactly `round(rate * maskable tokens)`,
at least one. By RoBERTa's rules (fairseq's mask_tokens_dataset.py) all tokens are maskable, including `<s>` and `</s>`,
the budget is `rate * tokens` rounded up or down at random, so that it is right on average, and random tokens are never
special ones. By ELECTRA's rules (its pretrain_helpers.py) the budget is `rate * tokens`, special ones counted, drawn
with replacement from the tokens other than special ones, so that fewer are masked, each once; no token becomes a random
one. By the rules "independent" (ModernBERT's sequence_packer.py) each token is masked with the same probability,
special ones too, and whatever the others. By the other rules, units are drawn in random order until the budget is full:

    token   single tokens (Devlin et al. 2018)
    word    whole words; a word that no longer fits is skipped (whole-word masking, BERT release of May 2019)
    ngram   one to three whole words, p(n) proportional to 1/n (Lan et al. 2019, equation 1)
    span    one to ten whole words, geometric with p = 0.2, replaced all in the same way (Joshi et al. 2019, 3.1)
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from .config import MaskingKind

Rules = Literal["bert", "roberta", "electra", "independent"]

# Probability of a unit of 1, 2, ... whole words.
UNIT_LENGTHS: dict[str, np.ndarray] = {
    "word": np.ones(1),
    "ngram": (1 / np.arange(1, 4)) / (1 / np.arange(1, 4)).sum(),
    "span": 0.2 * 0.8 ** np.arange(10) / (1 - 0.8**10),
}


class Masked(NamedTuple):
    """A batch after masking. P is the number of prediction slots per row, `Masking.slots(L)`."""

    input_ids: jax.Array  # [B, L] int32, with masked tokens replaced
    positions: jax.Array  # [B, P] int32, positions of the predictions, ascending; 0 in unused slots
    labels: jax.Array  # [B, P] int32, the original tokens; 0 in unused slots
    weights: jax.Array  # [B, P] float32, 1 for a prediction, 0 in unused slots


@dataclass(frozen=True, eq=False)
class Masking:
    """A way of masking tokens.

    Args:
        kind: unit of masking; see the module's docstring.
        rate: fraction of the maskable tokens to predict, in (0, 1].
        mask_id: id of [MASK].
        special: [V] bool, the special tokens ([CLS], [SEP], [PAD], ...).
        continuation: [V] bool, tokens that continue the word before them (`##ing`).
        rules: see the module's docstring; the last two mask single tokens.
        keep: fraction of the predicted tokens that is not changed.
        random: fraction of the predicted tokens that becomes a random token; the rest becomes [MASK].
    """

    kind: MaskingKind
    rate: float
    mask_id: int
    special: np.ndarray
    continuation: np.ndarray
    rules: Rules = "bert"
    keep: float = 0.1
    random: float = 0.1

    def slots(self, length: int) -> int:
        """Return the number of prediction slots of a row of `length` tokens; no row's budget exceeds it.

        Of independent draws, one row in 1e9 has more, six standard deviations above the mean; it keeps the first ones.
        """
        wanted = self.rate * length
        match self.rules:
            case "bert":
                return max(1, round(wanted))
            case "roberta":
                return min(length, math.floor(wanted) + 1)
            case "electra":
                return min(length, max(1, math.floor((self.rate + 0.005) * length)))
            case "independent":
                return min(length, math.ceil(wanted + 6 * math.sqrt(wanted * (1 - self.rate))))

    def __call__(self, key: jax.Array, input_ids: jax.Array, segment_ids: jax.Array, row_ids: jax.Array) -> Masked:
        """Mask a batch.

        Args:
            key: a PRNG key, the same for the whole run.
            input_ids: [B, L] int32.
            segment_ids: [B, L] int32; 0 is padding.
            row_ids: [B, 2] uint32, ids of the rows; rows with different ids are masked independently.
        """
        return jax.vmap(self._row, in_axes=(None, 0, 0, 0))(key, input_ids, segment_ids, row_ids)

    def _row(self, key: jax.Array, input_ids: jax.Array, segment_ids: jax.Array, row_id: jax.Array) -> Masked:
        key = jax.random.fold_in(jax.random.fold_in(key, row_id[0]), row_id[1])
        order_key, length_key, action_key, token_key = jax.random.split(key, 4)
        length = input_ids.shape[0]
        slots = self.slots(length)
        special = jnp.asarray(self.special)[input_ids]
        tokens = segment_ids > 0
        maskable = tokens if self.rules in ("roberta", "independent") else tokens & ~special
        available = maskable.sum().astype(jnp.float32)
        random_tokens = np.arange(len(self.special))
        match self.rules:
            case "bert":
                budget = jnp.where(available > 0, jnp.maximum(1, jnp.round(self.rate * available).astype(jnp.int32)), 0)
            case "roberta":
                rounding = jax.random.uniform(jax.random.fold_in(key, 4))
                budget = jnp.floor(self.rate * available + rounding).astype(jnp.int32)
                random_tokens = np.flatnonzero(~self.special)
            case "electra":
                wanted = jnp.round(self.rate * tokens.sum().astype(jnp.float32)).astype(jnp.int32)
                budget = jnp.where(available > 0, jnp.maximum(1, wanted), 0)
            case "independent":
                budget = jnp.int32(slots)
        budget = jnp.minimum(budget, slots)
        priority = jax.random.uniform(order_key, (length,))
        if self.rules == "independent":
            chosen, unit = maskable & (priority < self.rate), jnp.arange(length)
            chosen &= jnp.cumsum(chosen) <= budget
        elif self.rules == "electra":
            candidates = jnp.sort(jnp.where(maskable, jnp.arange(length), length))
            drawn = jax.random.randint(order_key, (slots,), 0, jnp.maximum(maskable.sum(), 1))
            drawn = jnp.where(jnp.arange(slots) < budget, candidates[drawn], length)
            chosen, unit = jnp.zeros(length, bool).at[drawn].set(True, mode="drop"), jnp.arange(length)
        elif self.kind == "token":
            rank = jnp.argsort(jnp.argsort(jnp.where(maskable, priority, 2.0)))
            chosen, unit = maskable & (rank < budget), jnp.arange(length)
        else:
            chosen, unit = self._choose_units(priority, length_key, input_ids, maskable, special, budget)
        # All tokens of a span are replaced in the same way; with the other kinds, each token is drawn separately.
        drawn = jax.random.uniform(action_key, (length,))
        drawn = drawn[unit] if self.kind == "span" else drawn
        drawn_tokens = jax.random.randint(token_key, (length,), 0, len(random_tokens), dtype=input_ids.dtype)
        replacement = jnp.asarray(random_tokens, input_ids.dtype)[drawn_tokens]
        return replace(self, slots, input_ids, chosen, drawn, replacement)

    def _choose_units(
        self,
        priority: jax.Array,
        length_key: jax.Array,
        input_ids: jax.Array,
        maskable: jax.Array,
        special: jax.Array,
        budget: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Choose units of whole words in random order while they fit into the budget.

        Returns:
            [L] bool, the chosen tokens, and [L] int32, the number of each chosen token's unit.
        """
        length = input_ids.shape[0]
        probabilities = UNIT_LENGTHS[self.kind]
        longest = len(probabilities)
        # A word starts at a maskable token that does not continue a maskable token before it; special tokens are words.
        follows = jnp.concatenate([jnp.zeros(1, bool), maskable[:-1]])
        joins = ~special & ~jnp.concatenate([jnp.zeros(1, bool), special[:-1]])
        starts = maskable & ~(jnp.asarray(self.continuation)[input_ids] & follows & joins)
        word = jnp.cumsum(starts) - 1  # number of each maskable token's word
        slot = jnp.where(maskable, word, length)
        # One word beyond the last for tokens outside words, and room for a unit that starts at the last word.
        sizes = jnp.zeros(length + longest, jnp.int32).at[slot].add(1).at[length].set(0)
        # Words of one unit must be neighbours: numbers of the unbroken stretches of maskable tokens.
        stretch = jnp.cumsum(maskable & ~follows)
        stretches = jnp.zeros(length + longest, jnp.int32).at[slot].max(stretch).at[length].set(0)
        words = starts.sum()
        order = jnp.argsort(jnp.full(length, 2.0).at[jnp.where(starts, word, length)].set(priority, mode="drop"))
        lengths = 1 + jax.random.choice(length_key, longest, (length,), p=jnp.asarray(probabilities, jnp.float32))
        offsets = jnp.arange(longest)

        def take(carry: tuple[jax.Array, jax.Array], candidate: tuple[jax.Array, jax.Array, jax.Array]):
            unit_of_word, total = carry
            number, first, wanted = candidate
            size = jax.lax.dynamic_slice(sizes, (first,), (longest,))
            taken = jax.lax.dynamic_slice(unit_of_word, (first,), (longest,))
            same = jax.lax.dynamic_slice(stretches, (first,), (longest,)) == stretches[first]
            free = (offsets < wanted) & same & (size > 0) & (taken < 0) & (first < words)
            run = jnp.cumprod(free.astype(jnp.int32)).astype(bool)  # stops at the first word that is not free
            run &= total + jnp.cumsum(size) <= budget
            updated = jax.lax.dynamic_update_slice(unit_of_word, jnp.where(run, number, taken), (first,))
            return (updated, total + jnp.where(run, size, 0).sum()), None

        start = (jnp.full(length + longest, -1, jnp.int32), jnp.int32(0))
        numbers = jnp.arange(length, dtype=jnp.int32)
        (unit_of_word, _), _ = jax.lax.scan(take, start, (numbers, order.astype(jnp.int32), lengths.astype(jnp.int32)))
        unit = unit_of_word[slot]
        chosen = maskable & (unit >= 0)
        return chosen, jnp.where(chosen, unit, 0)


class Shares(Protocol):
    """Fractions of the predicted tokens by what becomes of them; the rest becomes `mask_id`."""

    @property
    def mask_id(self) -> int: ...
    @property
    def keep(self) -> float: ...
    @property
    def random(self) -> float: ...


def replace(
    shares: Shares, slots: int, input_ids: jax.Array, chosen: jax.Array, drawn: jax.Array, replacement: jax.Array
) -> Masked:
    """Replace the chosen tokens of a row.

    Args:
        shares: how many are kept, and how many become random tokens.
        slots: number of prediction slots, P.
        input_ids: [L] int32.
        chosen: [L] bool.
        drawn: [L] float32 in [0, 1), which decides what becomes of each token.
        replacement: [L] int32, random tokens.

    Returns:
        the arrays of `Masked` for one row
    """
    length = input_ids.shape[0]
    hidden = jnp.where(
        drawn < shares.keep, input_ids, jnp.where(drawn < shares.keep + shares.random, replacement, shares.mask_id)
    )
    positions = jnp.sort(jnp.where(chosen, jnp.arange(length), length))[:slots]
    used = positions < length
    positions = jnp.where(used, positions, 0).astype(jnp.int32)
    return Masked(
        input_ids=jnp.where(chosen, hidden, input_ids),
        positions=positions,
        labels=jnp.where(used, input_ids[positions], 0),
        weights=used.astype(jnp.float32),
    )
