"""One step of a search, from a model's logits to the next tokens: greedy search, sampling and beam search.

Everything here is a pure function of arrays: R sentences, K hypotheses of each, V words. Models, their caches and the
formation of batches are elsewhere (`batch`, `scheduler`).

    search = Search(DecodeConfig(beam=5), eos_id=2)
    hypotheses = search.begin(start_tokens, ...)
    hypotheses, parents = search.advance(hypotheses, step, logits, ...)  # parents: the hypothesis that each continues

Beam search follows the reference implementation (transformers 5): the same candidates, the same order of penalties and
the same three stopping rules, and therefore the same sequences and scores.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .config import DecodeConfig
from .logits import completions, continuations, counts, likeliest, marked, narrowed

LOW = -1.0e9
"""A score lower than any real one; finite, so that sums with it are never NaN. As in the reference."""
NOTHING = -1.0e6
"""Scores below this are not real, whatever length `LOW` was divided by."""


class Finished(NamedTuple):
    """The best finished hypotheses so far, best first within their group; all [R, K]."""

    scores: Array  # float32, with the penalties
    steps: Array  # int32, the age of the sentence when the last token was chosen
    parents: Array  # int32, the live hypothesis that it was chosen for
    tokens: Array  # int32, the last token
    valid: Array  # bool, whether the hypothesis exists


class Hypotheses(NamedTuple):
    """The live hypotheses of R sentences, and the finished ones; outputs have at most T tokens, sources S."""

    tokens: Array  # [R, K] int32, the newest token of each live hypothesis
    scores: Array  # [R, K] float32, their log probabilities
    history: Array | None  # [R, K, T] int32, the tokens read so far, -1 after them; None unless a rule needs them;
    # [R, K, S + T] if outputs continue their sources, which they begin with
    coverage: Array | None  # [R, K, S] float32, attention that each source token has received; None likewise
    finished: Finished
    active: Array  # [R, G] bool, whether each group of beams is still searched


class Step(NamedTuple):
    """Position of each sentence."""

    age: Array  # [R] int32, steps before this one
    read: Array  # [R] int32, tokens read before this step: as many, and those of a source that the output continues
    forced: Array  # [R] int32, the prefix's token at this step, -1 after the prefix
    length: Array  # [R] int32, tokens generated, including this step's; 0 or less within the prefix


class Selection(NamedTuple):
    """The choices of a step for k hypotheses: all of a sentence, or one group of beams."""

    tokens: Array  # [R, k] int32
    scores: Array  # [R, k] float32
    parents: Array  # [R, k] int32, the one of the k that is continued
    finished: Finished  # [R, k]
    active: Array  # [R, 1] bool


@dataclass(frozen=True)
class Search:
    """The choice of the next tokens.

    Attributes:
        config: the options.
        eos_id: the token that ends an output.
        forced_eos_id: the token that outputs of maximum length must end with; None for any.
        forced_bos_id: the token that every output must begin with; None for any.
    """

    config: DecodeConfig
    eos_id: int
    forced_eos_id: int | None = None
    forced_bos_id: int | None = None

    def begin(
        self, start: Array, active: Array, source_length: int, max_tokens: int, continued: Array | None = None
    ) -> Hypotheses:
        """Return the hypotheses before the first step.

        Args:
            start: [R] int32, the token that each output begins with.
            active: [R] bool, whether there is a sentence.
            source_length: maximum number of source tokens, S.
            max_tokens: maximum number of output tokens, T.
            continued: [R, S] int32, the sources, -1 after them, if outputs continue them.
        """
        c = self.config
        shape = (len(start), c.width)
        none = jnp.full(shape, -1, jnp.int32)
        # The hypotheses of a group are equal at first: only one must count.
        duplicate = c.searches & (jnp.arange(c.width) % (c.width // c.diverse_groups) > 0)
        history = None
        if c.repetition_penalty != 1.0 or c.no_repeat_ngram:
            history = jnp.full((*shape, max_tokens), -1, jnp.int32)
            if continued is not None:
                before = jnp.broadcast_to(continued[:, None], (*shape, continued.shape[1]))
                history = jnp.concatenate([before, history], axis=2)
        return Hypotheses(
            tokens=jnp.broadcast_to(start[:, None], shape),
            scores=jnp.broadcast_to(jnp.where(duplicate, jnp.float32(LOW), jnp.float32(0.0))[None], shape),
            history=history,
            coverage=jnp.zeros((*shape, source_length), jnp.float32) if c.coverage_penalty else None,
            finished=Finished(jnp.full(shape, LOW, jnp.float32), none, none, none, jnp.zeros(shape, bool)),
            active=jnp.broadcast_to(active[:, None], (len(start), c.diverse_groups)),
        )

    def advance(
        self,
        hypotheses: Hypotheses,
        step: Step,
        logits: Array,
        attention: tuple[Array, ...],
        source_mask: Array,
        numbers: Array,
    ) -> tuple[Hypotheses, Array]:
        """Choose the next tokens.

        Args:
            hypotheses: hypotheses before the step.
            step: position of each sentence.
            logits: [R, K, V] float32, after the hypotheses' newest tokens.
            attention: each layer's attention to the source, [R, H, K, S]; used only for the coverage penalty.
            source_mask: [R, S] bool, True for tokens.
            numbers: [R] int32, numbers of the sentences, on which random draws depend.

        Returns:
            (the hypotheses after the step, parents [R, K] int32: the hypothesis that each of them continues)
        """
        history, coverage = hypotheses.history, hypotheses.coverage
        if history is not None:
            read_now = jnp.arange(history.shape[2])[None, None] == step.read[:, None, None]
            history = jnp.where(read_now, hypotheses.tokens[..., None], history)
        if coverage is not None:
            coverage = coverage + attention[-1].mean(axis=1)
        if self.config.searches:
            chosen = self._beams(hypotheses, step, logits, history, coverage, source_mask)
            at_parent = chosen.parents[..., None]
            history, coverage = (
                None if x is None else jnp.take_along_axis(x, at_parent, axis=1) for x in (history, coverage)
            )
        else:
            chosen = self._independent(hypotheses, step, logits, history, numbers)
        tokens, scores, parents, finished, active = chosen
        return Hypotheses(tokens, scores, history, coverage, finished, active), parents

    def _restrict(self, scores: Array, certain: Array, history: Array | None, step: Step) -> Array:
        """Apply the rules to scores [R, K, V], in the reference's order; forbidden tokens get -inf.

        certain [R, K] is the score of a forced token.
        """
        c = self.config
        words = scores.shape[-1]
        if history is not None and c.repetition_penalty != 1.0:
            penalised = jnp.where(scores < 0, scores * c.repetition_penalty, scores / c.repetition_penalty)
            scores = jnp.where(marked(history, words), penalised, scores)
        if history is not None and c.no_repeat_ngram:
            again = completions(history, step.read, c.no_repeat_ngram)
            scores = jnp.where(marked(again, words), -jnp.inf, scores)
        word = jnp.arange(words)[None, None]
        length = step.length[:, None, None]
        if c.min_length:
            scores = jnp.where((word == self.eos_id) & (length <= c.min_length), -jnp.inf, scores)
        if self.forced_bos_id is not None:
            forced = jnp.where(word == self.forced_bos_id, certain[..., None], -jnp.inf)
            scores = jnp.where(length == 1, forced, scores)
        if self.forced_eos_id is not None:
            forced = jnp.where(word == self.forced_eos_id, certain[..., None], -jnp.inf)
            scores = jnp.where(length == c.max_length, forced, scores)
        if c.suppressed:
            scores = scores.at[..., np.array(c.suppressed)].set(-jnp.inf)
        return scores

    def normaliser(self, length: Array) -> Array:
        """Return the length normaliser of `length` tokens, by which the log probability is divided."""
        c = self.config
        length = jnp.maximum(length, 1).astype(jnp.float32)
        return ((5.0 + length) / 6.0 if c.length_penalty_form == "gnmt" else length) ** c.length_penalty

    # Greedy search and sampling

    def _independent(
        self, hypotheses: Hypotheses, step: Step, logits: Array, history: Array | None, numbers: Array
    ) -> Selection:
        """Choose the most probable token of each hypothesis, or sample one."""
        c = self.config
        scores = self._restrict(logits, jnp.zeros_like(hypotheses.scores), history, step)
        if c.sample:
            scores = narrowed(scores / c.temperature, c.top_k, c.top_p)
            draw = jax.vmap(jax.vmap(jax.random.categorical))
            tokens = draw(_keys(c.seed, numbers, c.width, step.age), scores)
        else:
            tokens = likeliest(scores)
        forced = step.forced[:, None] >= 0
        tokens = jnp.where(forced, step.forced[:, None], tokens).astype(jnp.int32)
        gained = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
        totals = hypotheses.scores + jnp.where(forced, 0.0, gained)
        last = ((tokens == self.eos_id) | (step.length == c.max_length)[:, None]) & ~forced
        own = jnp.broadcast_to(jnp.arange(c.width, dtype=jnp.int32)[None], tokens.shape)
        age = jnp.broadcast_to(step.age[:, None], tokens.shape)
        ending = Finished(totals / self.normaliser(step.length)[:, None], age, own, tokens, last)
        first = last & ~hypotheses.finished.valid
        finished = Finished(*(jnp.where(first, a, b) for a, b in zip(ending, hypotheses.finished, strict=True)))
        active = hypotheses.active & ~finished.valid.all(axis=1, keepdims=True)
        return Selection(tokens, totals, own, finished, active)

    # Beam search

    def _beams(
        self,
        hypotheses: Hypotheses,
        step: Step,
        logits: Array,
        history: Array | None,
        coverage: Array | None,
        source_mask: Array,
    ) -> Selection:
        """Choose the best continuations of all hypotheses, group by group."""
        c = self.config
        size = c.beam // c.diverse_groups
        # Log probabilities are gains - norm, computed only for the candidates unless a rule needs them for all words.
        norm = jax.nn.logsumexp(logits, axis=-1)
        if c.repetition_penalty != 1.0:
            logits, norm = logits - norm[..., None], jnp.zeros_like(norm)
        logits, norm = jax.lax.optimization_barrier((logits, norm))  # else suppression would copy arrays still needed
        gains = self._restrict(logits, norm, history, step)
        if c.renormalise:
            norm = jax.nn.logsumexp(gains, axis=-1)
        bonus = jnp.zeros(hypotheses.scores.shape, jnp.float32)
        if coverage is not None:
            received = jnp.where(source_mask[:, None], jnp.log(jnp.minimum(coverage, 1.0)), 0.0)
            bonus = c.coverage_penalty * received.sum(axis=-1)
        selections: list[Selection] = []
        for group in range(c.diverse_groups):
            beams = slice(group * size, (group + 1) * size)
            own = gains[:, beams]
            if selections:
                before = jnp.concatenate([selection.tokens for selection in selections], axis=1)
                own = own - c.diversity_penalty * counts(before, own.shape[-1])[:, None]
            selection = self._group(
                own,
                norm[:, beams],
                hypotheses.scores[:, beams],
                bonus[:, beams],
                Finished(*(x[:, beams] for x in hypotheses.finished)),
                hypotheses.active[:, group],
                step,
            )
            # From numbering within the group to the sentence's; those that finished before already have the latter.
            new = selection.finished.steps == step.age[:, None]
            parents = selection.finished.parents + jnp.where(new, group * size, 0)
            selections.append(
                selection._replace(
                    parents=selection.parents + group * size, finished=selection.finished._replace(parents=parents)
                )
            )
        if len(selections) == 1:
            return selections[0]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *selections)

    def _group(
        self, gains: Array, norm: Array, scores: Array, bonus: Array, finished: Finished, active: Array, step: Step
    ) -> Selection:
        """Choose for one group: gains [R, k, V]; norm, scores and bonus [R, k]; active [R]."""
        c = self.config
        size = scores.shape[1]
        # Twice as many candidates as beams, so that enough remain live even if the better half ends.
        values, parents, words = continuations(gains, norm, scores, min(2 * size, size * gains.shape[-1]))
        longest = (step.length == c.max_length)[:, None]
        last = (words == self.eos_id) | longest

        live, order = jax.lax.top_k(values + jnp.where(last, LOW, 0.0), size)
        tokens, sources = (jnp.take_along_axis(x, order, axis=1) for x in (words, parents))

        # A candidate that ends counts if it is among the best k, and the group is still active.
        scored = values / self.normaliser(step.length)[:, None] + jnp.take_along_axis(bonus, parents, axis=1)
        counted = last & (jnp.arange(values.shape[1]) < size)[None] & active[:, None]
        age = jnp.broadcast_to(step.age[:, None], values.shape)
        ending = Finished(jnp.where(counted, scored, LOW), age, parents, words, counted)
        both = Finished(*(jnp.concatenate([a, b], axis=1) for a, b in zip(finished, ending, strict=True)))
        best = jax.lax.top_k(both.scores, size)[1]
        merged = Finished(*(jnp.take_along_axis(x, best, axis=1) for x in both))

        # Can a live hypothesis still beat the worst finished one?
        exhaustive = c.early_stopping == "exhaustive" and c.length_penalty > 0
        reached = jnp.int32(c.max_length) if exhaustive else step.length
        attainable = live[:, :1] / jnp.broadcast_to(self.normaliser(reached), step.length.shape)[:, None]
        worst = jnp.where(merged.valid, merged.scores.min(axis=1, keepdims=True), LOW)
        goes_on = active & (attainable > worst).any(axis=1) & ~longest[:, 0]
        if c.early_stopping == "first":
            goes_on &= ~merged.valid.all(axis=1)

        forced = step.forced[:, None] >= 0
        own = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32)[None], tokens.shape)
        return Selection(
            tokens=jnp.where(forced, step.forced[:, None], tokens).astype(jnp.int32),
            scores=jnp.where(forced, scores, live),
            parents=jnp.where(forced, own, sources),
            finished=Finished(*(jnp.where(forced, a, b) for a, b in zip(finished, merged, strict=True))),
            active=jnp.where(forced[:, 0], active, goes_on)[:, None],
        )


def _keys(seed: int, numbers: Array, width: int, age: Array) -> Array:
    """Return random keys [R, K], each from the seed, the sentence's number and age, and the number of the sample."""
    of_row = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)
    of_row = jax.vmap(jax.random.fold_in)(of_row, age)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(of_row, jnp.arange(width))
