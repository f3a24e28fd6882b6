"""A linear-chain conditional random field over tags (Lafferty et al. 2001; on neural features: Lample et al. 2016).

The score of tags y₁..yₙ for emissions e is start[y₁] + Σ eₜ[yₜ] + Σ transitions[yₜ₋₁, yₜ] + end[yₙ]; the probability is
the softmax of the scores over all sequences of tags. The normaliser is exact (forward algorithm), and so is the best
sequence (Viterbi).

Rows may be packed: a chain consists of the tagged positions of one segment, in order, and never crosses into another.
Positions in between (further tokens of a word, [CLS], padding) are skipped.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..checkpoints.tables import Entry, same
from ..layers.linear import partitioned

FORBIDDEN = -1e4
"""Added to the score of an illegal transition. Its exponential is 0 in float32 and float64; minus infinity would give
NaN gradients where no sequence is left."""


class CrfWeights(NamedTuple):
    """Transition scores between C tags."""

    start: Array  # [C], to begin with a tag
    transitions: Array  # [C, C], from the first to the second
    end: Array  # [C], to end with a tag


class Crf(nn.Module):
    """Parameters of the CRF. They are initialised to zero: no preference between transitions, as with a linear head."""

    labels: int

    @nn.compact
    def __call__(self) -> CrfWeights:
        zeros = nn.initializers.zeros_init()
        one, two = partitioned(zeros, "labels"), partitioned(zeros, "labels", "labels")
        return CrfWeights(
            self.param("start", one, (self.labels,), jnp.float32),
            self.param("transitions", two, (self.labels, self.labels), jnp.float32),
            self.param("end", one, (self.labels,), jnp.float32),
        )


def crf_entries(labels: int) -> list[Entry]:
    """Return the parameters' entries of a checkpoint table, with the names used by pytorch-crf."""
    return [
        Entry("crf.start_transitions", ("crf", "start"), same(labels)),
        Entry("crf.transitions", ("crf", "transitions"), same(labels, labels)),
        Entry("crf.end_transitions", ("crf", "end"), same(labels)),
    ]


def legal_steps(names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return what IOB2 allows: (initial tags [C] bool, transitions [C, C] bool).

    I-x may only follow B-x or I-x; everything else is allowed.
    """
    begins = np.array([not name.startswith("I-") for name in names], np.bool_)
    goes_on = [[a in (f"B-{b[2:]}", f"I-{b[2:]}") for b in names] for a in names]
    return begins, np.array(goes_on, np.bool_) | begins[None, :]


def constrained(weights: CrfWeights, names: Sequence[str]) -> CrfWeights:
    """Return the weights with every tag sequence that IOB2 does not allow made impossible."""
    begins, steps = legal_steps(names)
    return weights._replace(
        start=jnp.where(begins, weights.start, FORBIDDEN), transitions=jnp.where(steps, weights.transitions, FORBIDDEN)
    )


class _Chain(NamedTuple):
    """State that is carried along a row."""

    scores: Array  # [B, C], of all sequences of the chain at hand up to here that end with each tag
    segment: Array  # [B], its segment; 0 before the first
    tag: Array  # [B], the last one given
    given: Array  # [B], score of the given tags, all chains together
    total: Array  # [B], logarithm of the sum over all sequences, of the chains that are closed


def log_likelihood(weights: CrfWeights, emissions: Array, tags: Array, segment_ids: Array, tagged: Array) -> Array:
    """Compute the log probability of the given tags, summed over the chains of each row.

    Args:
        weights: float.
        emissions: [B, L, C], any float type; computed in float32 at least.
        tags: [B, L] int, read where `tagged`.
        segment_ids: [B, L] int.
        tagged: [B, L] bool, the positions that have a tag; none of them in segment 0.

    Returns:
        [B]; 0 for a row without chains.
    """
    emissions, weights = _widened(emissions, weights)
    batch, _, count = emissions.shape
    no_number = jnp.zeros(batch, emissions.dtype)
    nowhere = jnp.zeros(batch, segment_ids.dtype)
    first = _Chain(jnp.zeros((batch, count), emissions.dtype), nowhere, jnp.zeros(batch, tags.dtype), *[no_number] * 2)

    def step(chain: _Chain, here: tuple[Array, Array, Array, Array]) -> tuple[_Chain, None]:
        emitted, tag, segment, on = here
        begins = on & (segment != chain.segment)
        chain = _closed(chain, weights, begins)
        before = jax.nn.logsumexp(chain.scores[:, :, None] + weights.transitions[None], axis=1)
        scores = jnp.where(begins[:, None], weights.start[None], before) + emitted
        given = jnp.where(begins, weights.start[tag], weights.transitions[chain.tag, tag])
        given += jnp.take_along_axis(emitted, tag[:, None], axis=1)[:, 0]
        return _Chain(
            jnp.where(on[:, None], scores, chain.scores),
            jnp.where(on, segment, chain.segment),
            jnp.where(on, tag, chain.tag),
            chain.given + jnp.where(on, given, 0),
            chain.total,
        ), None

    tags = jnp.where(tagged, tags, 0)
    chain, _ = jax.lax.scan(step, first, _by_position(emissions, tags, segment_ids, tagged))
    chain = _closed(chain, weights, jnp.ones(batch, bool))
    return chain.given - chain.total


def _closed(chain: _Chain, weights: CrfWeights, here: Array) -> _Chain:
    """End the current chain, if any, in the rows `here`."""
    here = here & (chain.segment > 0)
    total = jax.nn.logsumexp(chain.scores + weights.end[None], axis=1)
    return chain._replace(
        given=chain.given + jnp.where(here, weights.end[chain.tag], 0), total=chain.total + jnp.where(here, total, 0)
    )


def decode(weights: CrfWeights, emissions: Array, segment_ids: Array, tagged: Array) -> Array:
    """Find the most probable tags (Viterbi). Arguments as in `log_likelihood`.

    Returns:
        [B, L] int32, 0 where nothing is tagged.
    """
    emissions, weights = _widened(emissions, weights)
    batch, _, count = emissions.shape

    def forward(carry: tuple[Array, Array], here: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], tuple]:
        scores, last = carry
        emitted, segment, on = here
        begins = on & (segment != last)
        steps = scores[:, :, None] + weights.transitions[None]
        best = jnp.where(begins[:, None], weights.start[None], steps.max(axis=1)) + emitted
        scores = jnp.where(on[:, None], best, scores)
        return (scores, jnp.where(on, segment, last)), (scores, _best(steps), begins, on)

    start = jnp.zeros((batch, count), emissions.dtype), jnp.zeros(batch, segment_ids.dtype)
    _, seen = jax.lax.scan(forward, start, _by_position(emissions, segment_ids, tagged))

    def backward(wanted: Array, here: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        """Step backward; `wanted` [B] is the tag that the chain's next position requires here, -1 if there is none."""
        scores, came_from, begins, on = here
        tag = jnp.where(wanted < 0, _best(scores + weights.end[None]), wanted)
        before = jnp.where(begins, -1, jnp.take_along_axis(came_from, tag[:, None], axis=1)[:, 0])
        return jnp.where(on, before, wanted), jnp.where(on, tag, 0)

    _, tags = jax.lax.scan(backward, jnp.full(batch, -1, jnp.int32), seen, reverse=True)
    return tags.T


def _best(scores: Array) -> Array:
    return jax.lax.argmax(scores, 1, jnp.int32)


def _widened(emissions: Array, weights: CrfWeights) -> tuple[Array, CrfWeights]:
    dtype = np.promote_types(jnp.asarray(emissions).dtype, np.float32)
    return jnp.asarray(emissions, dtype), CrfWeights(*(jnp.asarray(weight, dtype) for weight in weights))


def _by_position(*arrays: Array) -> Any:
    """Transpose arrays [B, L, ...] to a tuple of [L, B, ...]."""
    return tuple(jnp.moveaxis(array, 1, 0) for array in arrays)
