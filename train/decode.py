"""Decoding: greedy, beam search and sampling, for every model that generates.

    generate = Generator(model, params, DecodeConfig(beam=5))
    hypotheses = generate([[4, 8, 2], [15, 16, 23, 42, 2]])  # token lists in, the n best of each out, in order

Sentences are sorted by length, batched, and searched a batch at a time; what is compiled depends on the batch's sizes,
each rounded up to a few sizes, never on the sentences.

A beam's past is never moved. Each step writes its keys and values into slots of its own, K a step, and each beam
remembers which slot of each step it descends from; attention masks the others out. So reordering beams costs one small
table of numbers instead of a copy of the cache, the encoder's keys and values are read once for all beams of a
sentence, and the work left is matrix products.

The search of a batch runs on the device until every sentence is finished. It comes back to the host when its slots are
full, and goes on with four times as many, or when three quarters of its sentences are finished, and goes on with the
others.

Beam search is the reference implementation's (transformers 5): the same candidates, the same order of penalties, the
same three ways to stop, so the same sequences and scores.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .errors import RunError

LOW = -1.0e9
"""A score that nothing real has; finite, so that sums with it are never NaN. The reference's."""
NOTHING = -1.0e6
"""A bound below which no score is real, whatever length the one above was divided by."""


@dataclass(frozen=True)
class DecodeConfig:
    """How text is generated."""

    beam: int = 1
    """hypotheses kept for each sentence; 1 takes the most probable token each time"""
    max_length: int = 128
    """most tokens of an output, its end among them"""
    min_length: int = 0
    """fewest tokens of an output, its end not among them"""
    length_penalty: float = 1.0
    """exponent of the length that a hypothesis's log probability is divided by; 0 for none"""
    length_penalty_form: Literal["reference", "gnmt"] = "reference"
    """reference: length^p; gnmt: ((5 + length) / 6)^p (Wu et al. 2016, eq. 14)"""
    coverage_penalty: float = 0.0
    """weight of the sum over source tokens of log(min(attention received, 1)), added to a finished hypothesis's score
    (Wu et al. 2016, eq. 14); the attention is the last layer's, the mean of its heads"""
    n_best: int = 1
    """hypotheses given for each sentence; with sampling, independent ones"""
    early_stopping: Literal["no", "yes", "never"] = "no"
    """when a sentence is finished. no: no running hypothesis would beat the worst finished one at its present length;
    yes: as soon as there are as many finished ones as beams; never: none can beat it at any length"""
    diverse_groups: int = 1
    """groups that the beams are divided into, each searching what the ones before it did not choose (Vijayakumar et al.
    2016)"""
    diversity_penalty: float = 0.5
    """what a token loses for each time that a group before has chosen it at this step"""
    sample: bool = False
    """draw tokens instead of taking the most probable"""
    temperature: float = 1.0
    """what logits are divided by before drawing"""
    top_k: int = 0
    """draw from this many most probable tokens; 0 for all"""
    top_p: float = 1.0
    """draw from the fewest tokens that hold this share of the probability (Holtzman et al. 2019)"""
    seed: int = 0
    """of drawing; a sentence's draws depend on this and its number alone"""
    repetition_penalty: float = 1.0
    """divides positive scores of tokens that are there already, and multiplies negative ones (Keskar et al. 2019)"""
    no_repeat_ngram: int = 0
    """length of token sequences that may occur only once; 0 for no limit"""
    suppressed: tuple[int, ...] = ()
    """tokens that are never generated"""

    def __post_init__(self) -> None:
        self._at_least(1, "beam", "max_length", "n_best", "diverse_groups")
        self._at_least(0, "min_length", "top_k", "no_repeat_ngram", "coverage_penalty")
        if self.min_length >= self.max_length:
            raise RunError(f"min_length: expected less than max_length {self.max_length}, found {self.min_length}")
        if not self.temperature > 0 or not self.repetition_penalty > 0:
            raise RunError("temperature and repetition_penalty: expected numbers above 0")
        if not 0 < self.top_p <= 1:
            raise RunError(f"top_p: expected a number above 0 and at most 1, found {self.top_p}")
        if self.beam % self.diverse_groups:
            raise RunError(f"diverse_groups: expected a divisor of beam {self.beam}, found {self.diverse_groups}")
        if self.sample and self.beam > 1:
            raise RunError("sample: draws independent outputs, so beam must be 1; n_best says how many")
        if not self.sample and self.n_best > self.beam:
            raise RunError(f"n_best: expected at most beam {self.beam}, found {self.n_best}")
        if not self.sample and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise RunError("temperature, top_k and top_p change what is drawn; they need sample")

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            if getattr(self, name) < least:
                raise RunError(f"{name}: expected at least {least}, found {getattr(self, name)}")

    @property
    def searches(self) -> bool:
        """Whether this is beam search; else chains of tokens that know nothing of each other."""
        return self.beam > 1

    @property
    def width(self) -> int:
        """Hypotheses of a sentence that are computed at a time, K."""
        return self.beam if self.searches else self.n_best


class Steps(Protocol):
    """What a generating model offers, by its method `steps()`.

    All are pure functions. Every leaf of a memory has the rows first; every leaf of a cache is [rows, heads, slots, D].
    """

    @property
    def config(self) -> Any:
        """With decoder_start_token_id, eos_token_id and forced_eos_token_id, which may be None."""
        ...

    def prepare(self, params: Any) -> Any:
        """Parameters in the form that the others take."""
        ...

    def start(self, prepared: Any, input_ids: Array, segment_ids: Array) -> Any:
        """Read sources [B, S], whose segment is 1, or 0 for padding; gives a memory."""
        ...

    def cache(self, rows: int, slots: int) -> Any:
        """An empty cache."""
        ...

    def step(
        self, prepared: Any, memory: Any, cache: Any, tokens: Array, index: Array, mask: Array
    ) -> tuple[Array, Any, tuple[Array, ...]]:
        """Read tokens [B, K] at position `index`, attending to the slots of `mask` [B, K, slots].

        Returns (logits [B, K, V] float32, the cache, each layer's attention to the source [B, H, K, S]).
        """
        ...


class Hypothesis(NamedTuple):
    """One output."""

    tokens: list[int]  # without the start token and the end
    score: float  # log probability of what was generated (a prefix is not), divided by the length's penalty


class Sources(NamedTuple):
    """A batch of sentences on the device."""

    memory: Any  # the model's
    numbers: Array  # [R] int32, which sentence each row holds; -1 for a padding row
    mask: Array  # [R, S] bool, True for tokens
    prefix: Array  # [R, P] int32, the target's given first tokens, -1 after them


class Ended(NamedTuple):
    """The best finished hypotheses so far, best first within their group; all [R, K]."""

    scores: Array  # float32, with the penalties
    steps: Array  # int32, at which the last token came
    parents: Array  # int32, which running hypothesis it came to
    tokens: Array  # int32, the last token
    valid: Array  # bool, whether there is one


class Search(NamedTuple):
    """The state of the search of R sentences, K hypotheses each, with room for T tokens."""

    step: Array  # [] int32, tokens read so far
    cache: Any  # the model's
    tokens: Array  # [R, K] int32, the newest of each running hypothesis
    scores: Array  # [R, K] float32, their log probabilities
    origin: Array  # [R, K, T] int32, the slot of each step that they descend from; -1 for steps to come
    history: Array | None  # [R, K, T] int32, the tokens read, -1 for steps to come; None where nothing asks for them
    coverage: Array | None  # [R, K, S] float32, the attention each source token has received; None likewise
    chosen: Array  # [T, R, K] int32, the token that each running hypothesis got at each step
    parents: Array  # [T, R, K] int32, the one that it went on from
    ended: Ended
    open: Array  # [R, G] bool, whether the search of each group goes on


class Choice(NamedTuple):
    """What one step makes of running hypotheses: of all, or of those of one group."""

    tokens: Array  # [R, k] int32
    scores: Array  # [R, k] float32
    parents: Array  # [R, k] int32, among those of the group
    ended: Ended  # [R, k]
    open: Array  # [R] bool


class Moment(NamedTuple):
    """Where each row stands in a step."""

    step: Array  # [] int32
    given: Array  # [R] int32, the prefix's token, or -1 where the prefix is at its end
    length: Array  # [R] int32, tokens generated, with the one that is chosen now; 0 or less within the prefix


class Searcher:
    """The compiled parts of decoding with one model in one way."""

    def __init__(self, steps: Steps, config: DecodeConfig) -> None:
        self.steps = steps
        self.config = config
        special = steps.config
        self.start_id: int = special.decoder_start_token_id
        self.eos_id: int = special.eos_token_id
        self.forced_eos_id: int | None = special.forced_eos_token_id
        self.compilations = 0
        self.begin = jax.jit(self._begin, static_argnums=4)
        self.advance = jax.jit(self._advance, donate_argnums=2)
        self.resize = jax.jit(self._resize, static_argnums=3)

    def _begin(self, params: Any, ids: Array, numbers: Array, prefix: Array, slots: int) -> tuple[Sources, Search]:
        """Read a batch: ids [R, S] int32, -1 for padding; numbers [R]; prefix [R, P]."""
        self.compilations += 1  # this runs when it is traced
        c = self.config
        mask = ids >= 0
        memory = self.steps.start(self.steps.prepare(params), jnp.maximum(ids, 0), mask.astype(jnp.int32))
        shape = (len(ids), c.width)
        nobody = jnp.full(shape, -1, jnp.int32)
        past = jnp.full((*shape, slots), -1, jnp.int32)
        record = jnp.full((slots, *shape), -1, jnp.int32)
        # The hypotheses of a group begin alike: but for one of them, they must not count.
        behind = c.searches & (jnp.arange(c.width) % (c.width // c.diverse_groups) > 0)
        search = Search(
            step=jnp.int32(0),
            cache=self.steps.cache(len(ids), slots * c.width),
            tokens=jnp.full(shape, self.start_id, jnp.int32),
            scores=jnp.broadcast_to(jnp.where(behind, LOW, 0.0)[None], shape),
            origin=past,
            history=past if c.repetition_penalty != 1.0 or c.no_repeat_ngram else None,
            coverage=jnp.zeros((*shape, ids.shape[1]), jnp.float32) if c.coverage_penalty else None,
            chosen=record,
            parents=record,
            ended=Ended(jnp.full(shape, LOW, jnp.float32), nobody, nobody, nobody, jnp.zeros(shape, bool)),
            open=jnp.broadcast_to((numbers >= 0)[:, None], (len(ids), c.diverse_groups)),
        )
        return Sources(memory, numbers, mask, prefix), search

    def _advance(self, params: Any, sources: Sources, search: Search, enough: Array) -> Search:
        """Search until there is no more room, or at most `enough` [] sentences are open."""
        self.compilations += 1
        prepared = self.steps.prepare(params)
        slots = search.origin.shape[2]

        def going(search: Search) -> Array:
            return (search.step < slots) & (search.open.any(axis=1).sum() > enough)

        return jax.lax.while_loop(going, partial(self._step, prepared, sources), search)

    def _resize(self, sources: Sources, search: Search, keep: Array, slots: int) -> tuple[Sources, Search]:
        """Keep the rows `keep` [R'], -1 for a padding row, and make room for `slots` tokens."""
        self.compilations += 1
        more = slots - search.origin.shape[2]
        rows = jnp.maximum(keep, 0)

        def room(x: Array, axis: int, amount: int, value: int) -> Array:
            return jnp.pad(x, [(0, amount if i == axis else 0) for i in range(x.ndim)], constant_values=value)

        kept: Search = jax.tree.map(lambda x: x[rows], search._replace(step=None, chosen=None, parents=None))
        search = kept._replace(
            step=search.step,
            cache=jax.tree.map(lambda x: room(x, 2, more * self.config.width, 0), kept.cache),
            origin=room(kept.origin, 2, more, -1),
            history=None if kept.history is None else room(kept.history, 2, more, -1),
            chosen=room(search.chosen[:, rows], 0, more, -1),
            parents=room(search.parents[:, rows], 0, more, -1),
            open=kept.open & (keep >= 0)[:, None],
        )
        sources = jax.tree.map(lambda x: x[rows], sources)
        return sources._replace(numbers=jnp.where(keep < 0, -1, sources.numbers)), search

    # One step

    def _step(self, prepared: Any, sources: Sources, search: Search) -> Search:
        c = self.config
        rows, width, slots = search.origin.shape
        at = (0, 0, search.step)
        own = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None, :, None], (rows, width, 1))
        origin = jax.lax.dynamic_update_slice(search.origin, own, at)
        history, coverage = search.history, search.coverage
        if history is not None:
            history = jax.lax.dynamic_update_slice(history, search.tokens[..., None], at)
        mask = (origin[..., None] == jnp.arange(width)[None, None, None]).reshape(rows, width, slots * width)
        logits, cache, attention = self.steps.step(
            prepared, sources.memory, search.cache, search.tokens, search.step, mask
        )
        if coverage is not None:
            coverage = coverage + attention[-1].mean(axis=1)
        moment = _moment(sources.prefix, search.step)
        if c.searches:
            choice = self._search(sources, search, logits, history, coverage, moment)
            at_parent = choice.parents[..., None]
            origin, history, coverage = (
                None if x is None else jnp.take_along_axis(x, at_parent, axis=1) for x in (origin, history, coverage)
            )
        else:
            choice = self._follow(sources, search, logits, history, moment)
        assert origin is not None
        return Search(
            step=search.step + 1,
            cache=cache,
            tokens=choice.tokens,
            scores=choice.scores,
            origin=origin,
            history=history,
            coverage=coverage,
            chosen=jax.lax.dynamic_update_slice(search.chosen, choice.tokens[None], (search.step, 0, 0)),
            parents=jax.lax.dynamic_update_slice(search.parents, choice.parents[None], (search.step, 0, 0)),
            ended=choice.ended,
            open=choice.open,
        )

    def _restrict(self, scores: Array, certain: Array, history: Array | None, moment: Moment) -> Array:
        """Scores [R, K, V] by the reference's rules in its order: what repeats is lowered, what may not be is -inf.

        certain [R, K] is the score of what is bound to be.
        """
        c = self.config
        words = scores.shape[-1]
        if history is not None and c.repetition_penalty != 1.0:
            penalised = jnp.where(scores < 0, scores * c.repetition_penalty, scores / c.repetition_penalty)
            scores = jnp.where(_marked(history, words), penalised, scores)
        if history is not None and c.no_repeat_ngram:
            again = _completions(history, moment.step, c.no_repeat_ngram)
            scores = jnp.where(_marked(again, words), -jnp.inf, scores)
        end = jnp.arange(words) == self.eos_id
        length = moment.length[:, None, None]
        if c.min_length:
            scores = jnp.where(end[None, None] & (length <= c.min_length), -jnp.inf, scores)
        if self.forced_eos_id is not None:
            bound = jnp.arange(words) == self.forced_eos_id
            forced = jnp.where(bound[None, None], certain[..., None], -jnp.inf)
            scores = jnp.where(length == c.max_length, forced, scores)
        if c.suppressed:
            barred = np.zeros(words, bool)
            barred[list(c.suppressed)] = True
            scores = jnp.where(jnp.asarray(barred)[None, None], -jnp.inf, scores)
        return scores

    # Greedy and sampling

    def _follow(self, sources: Sources, search: Search, logits: Array, history: Array | None, moment: Moment) -> Choice:
        """Each hypothesis gets one more token, the best one or one that is drawn."""
        c = self.config
        scores = self._restrict(logits, jnp.zeros_like(search.scores), history, moment)
        if c.sample:
            scores = _narrowed(scores / c.temperature, c.top_k, c.top_p)
            draw = jax.vmap(jax.vmap(jax.random.categorical))
            tokens = draw(_keys(c.seed, sources.numbers, c.width, moment.step), scores)
        else:
            tokens = scores.argmax(axis=-1)
        given = moment.given[:, None] >= 0
        tokens = jnp.where(given, moment.given[:, None], tokens).astype(jnp.int32)
        gained = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
        totals = search.scores + jnp.where(given, 0.0, gained)
        last = ((tokens == self.eos_id) | (moment.length == c.max_length)[:, None]) & ~given
        own = jnp.broadcast_to(jnp.arange(c.width, dtype=jnp.int32)[None], tokens.shape)
        step = jnp.broadcast_to(moment.step, tokens.shape)
        new = Ended(totals / self._penalty(moment.length)[:, None], step, own, tokens, last)
        first = last & ~search.ended.valid
        ended = Ended(*(jnp.where(first, a, b) for a, b in zip(new, search.ended, strict=True)))
        return Choice(tokens, totals, own, ended, search.open & ~ended.valid.all(axis=1, keepdims=True))

    # Beam search

    def _search(
        self,
        sources: Sources,
        search: Search,
        logits: Array,
        history: Array | None,
        coverage: Array | None,
        moment: Moment,
    ) -> Choice:
        """The best of all continuations of all hypotheses, group by group."""
        c = self.config
        size = c.beam // c.diverse_groups
        # Log probabilities are gains - norm; of the candidates alone, where no rule needs them of all words.
        norm = jax.nn.logsumexp(logits, axis=-1)
        if c.repetition_penalty != 1.0:
            logits, norm = logits - norm[..., None], jnp.zeros_like(norm)
        gains = self._restrict(logits, norm, history, moment)
        bonus = jnp.zeros(search.scores.shape, jnp.float32)
        if coverage is not None:
            received = jnp.where(sources.mask[:, None], jnp.log(jnp.minimum(coverage, 1.0)), 0.0)
            bonus = c.coverage_penalty * received.sum(axis=-1)
        choices: list[Choice] = []
        for group in range(c.diverse_groups):
            part = slice(group * size, (group + 1) * size)
            own = gains[:, part]
            if choices:
                before = jnp.concatenate([choice.tokens for choice in choices], axis=1)
                own = own - c.diversity_penalty * _counts(before, own.shape[-1])[:, None]
            ended = Ended(*(x[:, part] for x in search.ended))
            choices.append(
                self._search_group(
                    own, norm[:, part], search.scores[:, part], bonus[:, part], ended, search.open[:, group], moment
                )
            )

        if len(choices) == 1:
            return choices[0]._replace(open=choices[0].open[:, None])
        for group, choice in enumerate(choices):
            # From the group's own numbers to the row's; those that ended before have the row's already.
            new = choice.ended.steps == moment.step
            ended = choice.ended._replace(parents=choice.ended.parents + jnp.where(new, group * size, 0))
            choices[group] = choice._replace(
                parents=choice.parents + group * size, ended=ended, open=choice.open[:, None]
            )
        return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *choices)

    def _search_group(
        self, gains: Array, norm: Array, scores: Array, bonus: Array, ended: Ended, open_: Array, moment: Moment
    ) -> Choice:
        """One group: gains [R, k, V]; norm, scores and bonus [R, k]; open_ [R]."""
        c = self.config
        size = scores.shape[1]
        # Twice as many candidates as beams, so that enough go on even where the better half ends.
        values, words = top_candidates(gains, min(2 * size, gains.shape[-1]))
        values = (values - norm[..., None] + scores[..., None]).reshape(len(values), -1)
        values, at = jax.lax.top_k(values, min(2 * size, values.shape[1]))
        parents = (at // words.shape[2]).astype(jnp.int32)
        words = jnp.take_along_axis(words.reshape(len(words), -1), at, axis=1)
        final = (moment.length == c.max_length)[:, None]
        last = (words == self.eos_id) | final

        running, order = jax.lax.top_k(values + jnp.where(last, LOW, 0.0), size)
        tokens, sources = (jnp.take_along_axis(x, order, axis=1) for x in (words, parents))

        # What ends counts if it is among the best k, where the group is still open.
        scored = values / self._penalty(moment.length)[:, None] + jnp.take_along_axis(bonus, parents, axis=1)
        counts = last & (jnp.arange(values.shape[1]) < size)[None] & open_[:, None]
        step = jnp.broadcast_to(moment.step, values.shape)
        new = Ended(jnp.where(counts, scored, LOW), step, parents, words, counts)
        both = Ended(*(jnp.concatenate([a, b], axis=1) for a, b in zip(ended, new, strict=True)))
        best = jax.lax.top_k(both.scores, size)[1]
        merged = Ended(*(jnp.take_along_axis(x, best, axis=1) for x in both))

        # May what is running still become better than the worst that has ended?
        longest = jnp.int32(c.max_length) if c.early_stopping == "never" and c.length_penalty > 0 else moment.length
        possible = running[:, :1] / jnp.broadcast_to(self._penalty(longest), moment.length.shape)[:, None]
        worst = jnp.where(merged.valid, merged.scores.min(axis=1, keepdims=True), LOW)
        still = open_ & (possible > worst).any(axis=1) & ~final[:, 0]
        if c.early_stopping == "yes":
            still &= ~merged.valid.all(axis=1)

        given = moment.given[:, None] >= 0
        stay = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32)[None], tokens.shape)
        return Choice(
            tokens=jnp.where(given, moment.given[:, None], tokens).astype(jnp.int32),
            scores=jnp.where(given, scores, running),
            parents=jnp.where(given, stay, sources),
            ended=Ended(*(jnp.where(given, a, b) for a, b in zip(ended, merged, strict=True))),
            open=jnp.where(given[:, 0], open_, still),
        )

    def _penalty(self, length: Array) -> Array:
        """What the log probability of `length` tokens is divided by."""
        c = self.config
        length = jnp.maximum(length, 1).astype(jnp.float32)
        return ((5.0 + length) / 6.0 if c.length_penalty_form == "gnmt" else length) ** c.length_penalty


def _moment(prefix: Array, step: Array) -> Moment:
    length = step + 1 - (prefix >= 0).sum(axis=1, dtype=jnp.int32)
    if not prefix.shape[1]:
        return Moment(step, jnp.full(length.shape, -1, jnp.int32), length)
    token = jax.lax.dynamic_index_in_dim(prefix, jnp.minimum(step, prefix.shape[1] - 1), 1, keepdims=False)
    return Moment(step, jnp.where(step < prefix.shape[1], token, -1), length)


def top_candidates(scores: Array, count: int) -> tuple[Array, Array]:
    """The `count` largest of scores [..., V], and where they are: as `jax.lax.top_k`, in a third of a CPU's time.

    They all lie in the `count` blocks with the largest maxima, which one pass without branches finds.
    """
    vocab, lead = scores.shape[-1], scores.ndim - 1
    blocks = -(-vocab // BLOCK)
    if blocks <= count:
        return jax.lax.top_k(scores, count)
    window = (1,) * lead + (BLOCK,)
    padding = [(0, 0)] * lead + [(0, blocks * BLOCK - vocab)]
    tops = jax.lax.reduce_window(scores, -jnp.inf, jax.lax.max, window, window, padding)
    _, best = jax.lax.top_k(tops, count)
    words = best[..., None] * BLOCK + jnp.expand_dims(jnp.arange(BLOCK), tuple(range(lead + 1)))
    words = words.reshape(*scores.shape[:-1], count * BLOCK)
    inside = jnp.take_along_axis(scores, words, axis=-1, mode="fill", fill_value=-jnp.inf)
    values, at = jax.lax.top_k(inside, count)
    return values, jnp.take_along_axis(words, at, axis=-1)


BLOCK = 16
"""Words of a block in `top_candidates`."""


def _marked(tokens: Array, words: int) -> Array:
    """tokens [R, K, X] int32, -1 for none -> bool [R, K, words], True for those."""
    rows, width, _ = tokens.shape
    row, beam = jnp.arange(rows)[:, None, None], jnp.arange(width)[None, :, None]
    place = jnp.where(tokens < 0, words, tokens)  # out of the array: dropped
    return jnp.zeros((rows, width, words), bool).at[row, beam, place].set(True, mode="drop")


def _counts(tokens: Array, words: int) -> Array:
    """tokens [R, X] -> how often each word is among a row's, float32 [R, words]."""
    rows = jnp.arange(len(tokens))[:, None]
    return jnp.zeros((len(tokens), words), jnp.float32).at[rows, tokens].add(1.0)


def _completions(history: Array, step: Array, size: int) -> Array:
    """The tokens that followed the newest size - 1 tokens wherever these stood before; [R, K, T], -1 for none."""
    length = history.shape[2]
    if length < size:
        return jnp.full_like(history, -1)
    starts = length - size + 1
    follows = jnp.broadcast_to(step + 2 >= size, (*history.shape[:2], starts))
    for i in range(size - 1):
        newest = jax.lax.dynamic_slice_in_dim(history, jnp.maximum(step - size + 2 + i, 0), 1, axis=2)
        follows &= history[..., i : i + starts] == newest
    return jnp.where(follows, history[..., size - 1 :], -1)


def _keys(seed: int, numbers: Array, width: int, step: Array) -> Array:
    """A key for each [R, K]: of the seed, the sentence, the sample and the step."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    of_row = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(of_row, jnp.arange(width))


def _narrowed(scores: Array, top_k: int, top_p: float) -> Array:
    """Scores [..., V] with -inf for what is not to be drawn."""
    if top_k and top_k < scores.shape[-1]:
        least = jax.lax.top_k(scores, top_k)[0][..., -1:]
        scores = jnp.where(scores < least, -jnp.inf, scores)
    if top_p < 1.0:
        ordered = -jnp.sort(-scores, axis=-1)
        shares = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares
        least = jnp.where(before < top_p, ordered, jnp.inf).min(axis=-1, keepdims=True)
        scores = jnp.where(scores < least, -jnp.inf, scores)
    return scores


class Generator:
    """Generates from lists of tokens.

    Attributes:
        config: how.
        rows: most sentences searched at a time.
    """

    # Every size takes a second or two to compile, so there are few: rows and slots go in steps of four, the lengths of
    # sources in powers of two.
    FIRST_SLOTS = 32  # tokens of a target that there is room for at first
    FEWEST_ROWS = 4  # a batch of fewer sentences is filled up
    FEWEST_TOKENS = 32  # a shorter source is filled up

    def __init__(self, model: Any, params: Any, config: DecodeConfig, *, rows: int = 64) -> None:
        """Args: model: with a method `steps()`; params: its parameters, unboxed; rows: sentences searched at a time.

        Raises:
            RunError: an output would be longer than the model has positions, or a token that it does not have.
        """
        if rows < 1:
            raise RunError(f"rows: expected at least 1, found {rows}")
        self.config = config
        self.rows = rows
        self.positions: int = model.config.positions
        if config.max_length > self.positions:
            raise RunError(f"max_length {config.max_length}: the model has {self.positions} positions")
        words = model.config.target_words
        if any(not 0 <= token < words for token in config.suppressed):
            raise RunError(f"suppressed: expected tokens from 0 to {words - 1}, found {config.suppressed}")
        self._searcher = Searcher(model.steps(), config)
        self._params = jax.device_put(params)

    def with_params(self, params: Any) -> "Generator":
        """The same programs with other parameters, as for a model in training."""
        other = copy.copy(self)
        other._params = jax.device_put(params)
        return other

    @property
    def compilations(self) -> int:
        """Programs compiled so far."""
        return self._searcher.compilations

    def __call__(
        self, sources: Sequence[Sequence[int]], prefixes: Sequence[Sequence[int]] | None = None, *, first: int = 0
    ) -> list[list[Hypothesis]]:
        """Generate for each source.

        Args:
            sources: tokens as the encoder reads them, the end token included.
            prefixes: the first tokens of each output, which may be empty; None for none.
            first: the first source's number, where these are a part of many: what is drawn depends on the number.

        Returns:
            `n_best` hypotheses for each source, best first (fewer where there are not so many); drawn ones as drawn.

        Raises:
            RunError: an empty source, or one longer than the model has positions, by its number.
        """
        prefixes = [()] * len(sources) if prefixes is None else prefixes
        if len(prefixes) != len(sources):
            raise RunError(f"{len(sources)} sources, but {len(prefixes)} prefixes")
        for number, (source, prefix) in enumerate(zip(sources, prefixes, strict=True)):
            if not 0 < len(source) <= self.positions:
                raise RunError(f"source {number}: expected 1 to {self.positions} tokens, found {len(source)}")
            if len(prefix) + self.config.max_length > self.positions:
                raise RunError(
                    f"prefix {number}: {len(prefix)} tokens and max_length {self.config.max_length} more do not fit"
                    f" the model's {self.positions} positions"
                )
        order = sorted(range(len(sources)), key=lambda i: (-len(sources[i]), -len(prefixes[i])))
        found: dict[int, list[Hypothesis]] = {}
        for start in range(0, len(order), self.rows):
            self._batch(order[start : start + self.rows], sources, prefixes, first, found)
        return [found[i] for i in range(len(sources))]

    def _batch(
        self,
        chosen: Sequence[int],
        sources: Sequence[Sequence[int]],
        prefixes: Sequence[Sequence[int]],
        first: int,
        found: dict[int, list[Hypothesis]],
    ) -> None:
        """Search one batch and put its hypotheses into `found`."""
        longest = max(len(prefixes[i]) for i in chosen)
        rows = self._rounded_rows(len(chosen))
        limit = self._rounded(longest + self.config.max_length)
        slots = min(self.FIRST_SLOTS, limit)
        ids = _filled([sources[i] for i in chosen], rows, self._rounded(max(len(sources[i]) for i in chosen)))
        prefix = _filled([prefixes[i] for i in chosen], rows, self._rounded(longest) if longest else 0)
        numbers = np.full(rows, -1, np.int32)
        numbers[: len(chosen)] = chosen
        s = self._searcher
        read, search = s.begin(self._params, ids, np.where(numbers < 0, -1, numbers + first), prefix, slots)
        while True:
            enough = rows // 4 if rows // 4 >= self.FEWEST_ROWS else 0
            search = s.advance(self._params, read, search, np.int32(enough))
            step, open_ = jax.device_get((search.step, search.open.any(axis=1)))
            (going,) = np.nonzero(open_)
            self._collect(search, numbers, np.nonzero(~open_ & (numbers >= 0))[0], found)
            if not len(going):
                return
            if step == slots:
                slots = min(4 * slots, limit)
            rows = min(rows, self._rounded_rows(len(going)))
            keep = np.full(rows, -1, np.int32)
            keep[: len(going)] = going
            numbers = np.where(keep < 0, -1, numbers[keep])
            read, search = s.resize(read, search, keep, slots)

    def _collect(
        self, search: Search, numbers: np.ndarray, finished: np.ndarray, found: dict[int, list[Hypothesis]]
    ) -> None:
        """Follow the finished hypotheses of rows `finished` back to their beginnings."""
        if not len(finished):
            return
        chosen, parents, ended = jax.device_get((search.chosen, search.parents, search.ended))
        for row in finished:
            best = range(self.config.n_best)
            if self.config.diverse_groups > 1:
                best = np.argsort(-ended.scores[row], kind="stable")[: self.config.n_best]
            hypotheses = []
            for i in best:
                if hypotheses and not ended.scores[row, i] > NOTHING:
                    break
                tokens, parent = [int(ended.tokens[row, i])], ended.parents[row, i]
                for step in range(ended.steps[row, i] - 1, -1, -1):
                    tokens.append(int(chosen[step, row, parent]))
                    parent = parents[step, row, parent]
                if tokens[0] == self._searcher.eos_id:
                    tokens = tokens[1:]
                hypotheses.append(Hypothesis(tokens[::-1], float(ended.scores[row, i])))
            found[int(numbers[row])] = hypotheses

    def _rounded(self, length: int) -> int:
        return min(self.positions, max(self.FEWEST_TOKENS, 1 << (length - 1).bit_length()))

    def _rounded_rows(self, count: int) -> int:
        rows = self.rows
        while rows // 4 >= max(count, self.FEWEST_ROWS):
            rows //= 4
        return rows


def _filled(lists: Sequence[Sequence[int]], rows: int, length: int) -> np.ndarray:
    """[rows, length] int32, -1 where there is no token."""
    array = np.full((rows, length), -1, np.int32)
    for row, tokens in zip(array, lists, strict=False):
        row[: len(tokens)] = tokens
    return array
