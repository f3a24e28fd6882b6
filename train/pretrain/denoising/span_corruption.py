"""Span corruption: spans of tokens become sentinels, and the decoder writes them, each after its sentinel.

Raffel et al. 2020, 3.1.4 and 3.3.4, as the original's code does it (`span_corruption` and `random_spans_noise_mask` in
t5/data/preprocessors.py): 15 % of a row's tokens are noise, in spans of 3 on average; both the noise and what is kept
are divided at random into as many non-empty spans, which alternate. A row begins with a kept span and ends with noise,
so that no sentinel follows the last one (in the paper's figure 2 one does). Both sides end with the end token. Rows are
blocks of running text as long as gives the encoder --sequence-length tokens: 568 for 512, whose targets have 114.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from ....data import DocumentStore, Tokenizer
from ....data.corpus.document_store import Split
from ....data.rows.token_blocks import TokenBlocks
from ....data.stream import RowSource
from ...errors import RunError
from ..config import PretrainConfig
from ..objective import Batch, Term
from .restoring import Restoring, both_sides, row_keys

MEAN_SPAN = 3.0  # tokens
SHORTEST = 8  # row


class Sizes(NamedTuple):
    """Number of tokens of a corrupted row."""

    noise: int
    spans: int
    source: int  # with sentinels and the end token
    target: int


def sizes(length: int, rate: float) -> Sizes:
    """Return the sizes of a row of `length` tokens, of which the fraction `rate` is noise. A single token is kept."""
    if length < 2:
        return Sizes(0, 0, length + 1, 0)
    noise = min(max(int(np.round(length * rate)), 1), length - 1)
    spans = max(int(np.round(noise / MEAN_SPAN)), 1)
    return Sizes(noise, spans, length - noise + spans + 1, noise + spans + 1)


def raw_length(source: int, rate: float) -> int:
    """Return the greatest number of tokens of a row whose corrupted form has at most `source`."""
    length = 1
    while sizes(length + 1, rate).source <= source:
        length += 1
    return length


def parts(uniforms: jax.Array, items: jax.Array, count: jax.Array) -> jax.Array:
    """Divide items into non-empty parts, each composition with the same probability.

    Args:
        uniforms: [N] float32, random numbers; items begin a part where the first `items` - 1 of them are smallest.
        items: [] int32, at most N.
        count: [] int32, number of parts, at most `items`.

    Returns:
        [N] int32, the sizes of the parts, then zeros.
    """
    places = jnp.arange(len(uniforms))
    rank = jnp.argsort(jnp.argsort(jnp.where(places < items - 1, uniforms, 2.0)))
    begins = jnp.concatenate([jnp.zeros(1, bool), (rank < count - 1)[:-1]])
    return jnp.zeros(len(uniforms), jnp.int32).at[jnp.cumsum(begins)].add((places < items).astype(jnp.int32))


def noise_mask(noise: jax.Array, kept: jax.Array, length: jax.Array, rate: float) -> jax.Array:
    """Choose the noise of a row of `length` tokens: [N] bool.

    Args:
        noise: [N] float32, random numbers that divide the noise.
        kept: [N] float32, random numbers that divide what is kept.
        length: [] int32, number of tokens, at most N.
        rate: fraction of noise.
    """
    table = [sizes(number, rate) for number in range(len(noise) + 1)]
    total, spans = (jnp.asarray(np.array([getattr(size, name) for size in table], np.int32))[length]
                    for name in ("noise", "spans"))  # fmt: skip
    noise_sizes, kept_sizes = parts(noise, total, spans), parts(kept, length - total, spans)
    ends = jnp.cumsum(noise_sizes + kept_sizes)
    own = jnp.arange(len(noise)) < spans
    change = jnp.zeros(len(noise) + 1, jnp.int32)
    change = change.at[jnp.where(own, ends - noise_sizes, len(noise))].add(1)
    change = change.at[jnp.where(own, ends, len(noise))].add(-1)
    return (jnp.cumsum(change)[:-1] > 0) & (jnp.arange(len(noise)) < length)


def with_sentinels(
    ids: jax.Array, out: jax.Array, used: jax.Array, sentinels: jax.Array, end: int, size: int
) -> tuple[jax.Array, jax.Array]:
    """Replace each span of a row by its sentinel, and add the end token.

    Args:
        ids: [N] int32, the row.
        out: [N] bool, the spans.
        used: [N] bool, the row's tokens.
        sentinels: [K] int32, in order of the spans.
        end: end token.
        size: number of tokens to return.

    Returns:
        ([size] int32, [] int32, number of them that count)
    """
    out = out & used
    begins = out & ~jnp.concatenate([jnp.zeros(1, bool), out[:-1]])
    kept = used & (~out | begins)
    number = jnp.minimum(jnp.cumsum(begins) - 1, len(sentinels) - 1)
    tokens = jnp.where(begins, sentinels[number], ids)
    places = jnp.where(kept, jnp.cumsum(kept) - 1, size)
    count = kept.sum(dtype=jnp.int32)
    return jnp.zeros(size, ids.dtype).at[places].set(tokens, mode="drop").at[count].set(end, mode="drop"), count + 1


@dataclass(frozen=True, eq=False)
class SpanCorruption(Restoring):
    """The objective `span-corruption`, with the loss "spans".

    Attributes:
        rate: fraction of the tokens that is noise.
        sentinels: [K] int32, ids of the sentinels, the first span's first.
    """

    rate: float
    sentinels: np.ndarray
    name = "spans"
    shown = ("spans_accuracy",)
    terms = (Term("spans"),)
    units: ClassVar = ("span",)
    own_rows: ClassVar = "blocks of running text"

    @classmethod
    def create(cls, config: PretrainConfig, tokenizer: Tokenizer) -> Self:
        """See `ObjectiveClass.create`."""
        assert config.mask_rate is not None
        where = config.tokenizer_folder or "the tokenizer"
        number = {token: i for i, token in enumerate(tokenizer.tokens) if token.startswith("<extra_id_")}
        sentinels = [number[f"<extra_id_{i}>"] for i in range(len(number)) if f"<extra_id_{i}>" in number]
        if not sentinels or "eos" not in tokenizer.special_ids or "pad" not in tokenizer.special_ids:
            raise RunError(
                f"{where}: a tokenizer without sentinels (<extra_id_0>, ...), an end token or a padding token, which "
                "--objective span-corruption needs. `bestiary tokenizer train --kind unigram --family t5` makes one."
            )
        for phase in config.plan:
            if phase.length < SHORTEST:
                raise RunError(f"A sequence length of {phase.length}: span corruption needs {SHORTEST} or more.")
            found = sizes(raw_length(phase.length, config.mask_rate), config.mask_rate)
            spans = found.spans
            if spans > found.source - spans - 1:
                raise RunError(f"--mask-rate {config.mask_rate}: more spans than tokens between them. Lower it.")
            if spans > len(sentinels):
                raise RunError(
                    f"{where}: {len(sentinels)} sentinels, but rows of {phase.length} tokens have {spans} spans. Lower "
                    "--sequence-length or --mask-rate."
                )
        pad = tokenizer.special_ids["pad"]
        return cls(tokenizer, config.z_loss, pad, config.mask_rate, np.array(sentinels, np.int32))

    def rows(self, store: DocumentStore, split: Split, *, sequence_length: int, **settings: Any) -> RowSource:
        """See `Objective.rows`."""
        length = raw_length(sequence_length, self.rate)
        return TokenBlocks(store, self.tokenizer, split, sequence_length=length, **settings)

    @cached_property
    def _end(self) -> int:
        return self.tokenizer.special_ids["eos"]

    def corrupt(self, key: jax.Array, batch: Batch) -> Batch:
        """Replace spans by sentinels."""
        rows = jax.vmap(self._row)(row_keys(key, batch["row_ids"]), batch["input_ids"], batch["segment_ids"])
        return {**batch, **rows}

    def _row(self, key: jax.Array, ids: jax.Array, segments: jax.Array) -> Batch:
        most, used, sentinels = sizes(len(ids), self.rate), segments > 0, jnp.asarray(self.sentinels)
        length = used.sum(dtype=jnp.int32)
        noise, kept = jax.random.uniform(key, (2, len(ids)))
        mask = noise_mask(noise, kept, length, self.rate)
        source, source_length = with_sentinels(ids, mask, used, sentinels, self._end, most.source)
        target, target_length = with_sentinels(ids, ~mask, used, sentinels, self._end, most.target)
        source_length = jnp.where(length > 0, source_length, 0)
        target_length = jnp.where(length > 1, target_length, 0)
        return both_sides(source, source_length, target, target_length, self.start, self.start)
