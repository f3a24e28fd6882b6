"""Search on the device: what `decode.Generator` runs, compiled.

A pool has R rows. Each holds a sentence or is free: sentences are admitted into free rows while the others go on, each
at an age of its own, and the host collects what has ended.

A beam's past is never moved. The beams of a sentence share its slots of keys and values; each writes its newest token
into a slot that none of them descends from, and remembers which ones it descends from; attention masks the others out.
So reordering beams costs one small table instead of a copy of the cache, the encoder's keys and values are read once
for all beams of a sentence, and the work left is matrix products. Few slots are enough: beams have most of their past
in common, and what one leaves that ends is free again. Five beams that translate a caption of 13 words descend from 17
slots at a time in the mean, and hardly ever from more than 75.

Beam search is the reference implementation's (transformers 5): the same candidates, the same order of penalties, the
same three ways to stop, so the same sequences and scores.
"""

import math
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .config import DecodeConfig

LOW = -1.0e9
"""A score that nothing real has; finite, so that sums with it are never NaN. The reference's."""
NOTHING = -1.0e6
"""A bound below which no score is real, whatever length the one above was divided by."""


class Steps(Protocol):
    """What a generating model offers, by its method `steps()`.

    All are pure functions; all but `prepare` can be traced. Every leaf of a memory and of a cache has the rows first.
    """

    @property
    def config(self) -> Any:
        """With decoder_start_token_id, eos_token_id and forced_eos_token_id, which may be None."""
        ...

    def prepare(self, params: Any) -> Any:
        """Parameters in the form that the others take; not a part of a compiled program."""
        ...

    def start(self, prepared: Any, input_ids: Array, segment_ids: Array) -> Any:
        """Read sources [B, S], whose segment is 1, or 0 for padding; gives a memory."""
        ...

    def cache(self, rows: int, slots: int) -> Any:
        """A cache; only its shapes are asked for. It begins as zeros, and more slots are zeros after the others."""
        ...

    def step(
        self, prepared: Any, memory: Any, cache: Any, tokens: Array, positions: Array, places: Array, mask: Array
    ) -> tuple[Array, Any, tuple[Array, ...]]:
        """Read tokens [B, K] at `positions` [B] into slots `places` [B, K], attending to those of `mask` [B, K, slots].

        A place that is no slot's number stands for none.

        Returns (logits [B, K, V] float32, the cache, each layer's attention to the source [B, H, K, S]).
        """
        ...


class Sources(NamedTuple):
    """The sentences of a pool."""

    memory: Any  # the model's
    mask: Array  # [R, S] bool, True for tokens
    prefix: Array  # [R, P] int32, the target's given first tokens, -1 after them


class Ended(NamedTuple):
    """The best finished hypotheses so far, best first within their group; all [R, K]."""

    scores: Array  # float32, with the penalties
    steps: Array  # int32, the sentence's age when the last token came
    parents: Array  # int32, which running hypothesis it came to
    tokens: Array  # int32, the last token
    valid: Array  # bool, whether there is one


class Rows(NamedTuple):
    """The state of the search of R sentences, K hypotheses each, none older than T steps."""

    began: Array  # [R] int32, the step before which each sentence was admitted; its age is the steps since
    tokens: Array  # [R, K] int32, the newest of each running hypothesis
    scores: Array  # [R, K] float32, their log probabilities
    history: Array | None  # [R, K, T] int32, the tokens read, by age, -1 after them; None where nothing asks for them
    coverage: Array | None  # [R, K, S] float32, the attention each source token has received; None likewise
    ended: Ended
    open: Array  # [R, G] bool, whether the search of each group goes on


class Search(NamedTuple):
    """The state of a pool's search."""

    step: Array  # [] int32, steps of the pool so far
    cache: Any  # the model's
    chosen: Array  # [T, R, K] int32, at s mod T the token that each running hypothesis got at step s
    parents: Array  # [T, R, K] int32, the one that it went on from
    past: Array  # [R, K, X] bool, which of a row's X slots each running hypothesis descends from
    rows: Rows


class Choice(NamedTuple):
    """What one step makes of running hypotheses: of all, or of those of one group."""

    tokens: Array  # [R, k] int32
    scores: Array  # [R, k] float32
    parents: Array  # [R, k] int32, among those of the group
    ended: Ended  # [R, k]
    open: Array  # [R] bool


class Moment(NamedTuple):
    """Where each row stands in a step."""

    age: Array  # [R] int32, tokens read before this step
    given: Array  # [R] int32, the prefix's token, or -1 where the prefix is at its end
    length: Array  # [R] int32, tokens generated, with the one that is chosen now; 0 or less within the prefix


class Searcher:
    """The compiled parts of decoding with one model in one way.

    Args:
        steps: the model's.
        config: how.
        options: of XLA's compiler, beside its flags.
    """

    def __init__(self, steps: Steps, config: DecodeConfig, options: dict[str, Any] | None = None) -> None:
        self.steps = steps
        self.config = config
        special = steps.config
        self.start_id: int = special.decoder_start_token_id
        self.eos_id: int = special.eos_token_id
        self.forced_eos_id: int | None = special.forced_eos_token_id
        self.compilations = 0
        self._shapes: dict[tuple[int, ...], tuple[Sources, Search]] = {}  # of pools of these sizes
        self.admit = jax.jit(self._admit, donate_argnums=(1, 2), compiler_options=options)
        self.advance = jax.jit(self._advance, donate_argnums=2, compiler_options=options)
        self.widen = jax.jit(self._widen, static_argnums=1, compiler_options=options)

    def clear(
        self, prepared: Any, rows: int, length: int, prefix: int, most: int, slots: int
    ) -> tuple[Sources, Search]:
        """A pool of free rows for sources of `length` tokens, prefixes of `prefix` and outputs of `most`.

        Each array is filled by itself, which takes no program of these sizes.
        """
        ids, taken = jax.ShapeDtypeStruct((rows, length), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.bool_)

        def describe(prepared: Any, ids: Array, taken: Array) -> tuple[Sources, Search]:
            record = jnp.zeros((most, rows, self.config.width), jnp.int32)
            given = jnp.zeros((rows, prefix), jnp.int32)
            sources = Sources(self.steps.start(prepared, ids, ids), ids > 0, given)
            past = jnp.zeros((rows, self.config.width, slots), bool)
            fresh = self._fresh(jnp.int32(0), taken, length, most)
            return sources, Search(jnp.int32(0), self.steps.cache(rows, slots), record, record, past, fresh)

        sizes = (rows, length, prefix, most, slots)
        if sizes not in self._shapes:
            self._shapes[sizes] = jax.eval_shape(describe, prepared, ids, taken)
        # Nobody asks what is in a free row; but it must not be open, and everything is finite.
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._shapes[sizes])

    def _admit(
        self,
        prepared: Any,
        sources: Sources,
        rows: Rows,
        step: Array,
        ids: Array,
        taken: Array,
        prefix: Array,
        places: Array,
    ) -> tuple[Sources, Rows]:
        """Seat sentences in free rows.

        step [] is the search's; ids [N, S] int32, -1 for padding; taken [N] bool, whether there is one; prefix [N, P];
        places [N], the rows, R for none. The program is the same however many slots there are.
        """
        self.compilations += 1
        mask = ids >= 0
        memory = self.steps.start(prepared, jnp.maximum(ids, 0), mask.astype(jnp.int32))
        most = 0 if rows.history is None else rows.history.shape[2]
        fresh = self._fresh(step, taken, ids.shape[1], most)

        def seat(old: Array, new: Array) -> Array:
            return old.at[places].set(new, mode="drop")

        return jax.tree.map(seat, (sources, rows), (Sources(memory, mask, prefix), fresh))

    def _fresh(self, step: Array, taken: Array, length: int, most: int) -> Rows:
        """Sentences of age 0 at `step` [], open where `taken` [N] says that there is one."""
        c = self.config
        shape = (len(taken), c.width)
        nobody = jnp.full(shape, -1, jnp.int32)
        repeats = c.repetition_penalty != 1.0 or c.no_repeat_ngram
        # The hypotheses of a group begin alike: but for one of them, they must not count.
        behind = c.searches & (jnp.arange(c.width) % (c.width // c.diverse_groups) > 0)
        return Rows(
            began=jnp.broadcast_to(step, taken.shape),
            tokens=jnp.full(shape, self.start_id, jnp.int32),
            scores=jnp.broadcast_to(jnp.where(behind, jnp.float32(LOW), jnp.float32(0.0))[None], shape),
            history=jnp.full((*shape, most), -1, jnp.int32) if repeats else None,
            coverage=jnp.zeros((*shape, length), jnp.float32) if c.coverage_penalty else None,
            ended=Ended(jnp.full(shape, LOW, jnp.float32), nobody, nobody, nobody, jnp.zeros(shape, bool)),
            open=jnp.broadcast_to(taken[:, None], (len(taken), c.diverse_groups)),
        )

    def _advance(self, prepared: Any, sources: Sources, search: Search, numbers: Array, enough: Array) -> Search:
        """Search until at most `enough` [] sentences are open, or until the host must make room.

        That is where an open one has no slots for another step, or one that has ended would lose its records.
        numbers [R] int32: which sentence each row holds; -1 for a free row.
        """
        self.compilations += 1

        def going(search: Search) -> Array:
            open_ = search.rows.open.any(axis=1)
            crowded = _free(search.past).sum(axis=1) < self.config.width
            oldest = jnp.where(numbers >= 0, search.step - search.rows.began, 0).max()
            return (open_.sum() > enough) & ~(open_ & crowded).any() & (oldest < len(search.chosen))

        # Whoever was just seated has no past; slots and records hold that of those before, from which nobody descends.
        grown = search.step > search.rows.began
        search = search._replace(past=search.past & grown[:, None, None])
        return jax.lax.while_loop(going, partial(self._step, prepared, sources, numbers), search)

    def _widen(self, search: Search, slots: int) -> Search:
        """Give every row `slots` slots, more than it had."""
        self.compilations += 1
        rows, width, _ = search.past.shape

        def fill(array: Array, to: Any) -> Array:
            return jnp.pad(array, [(0, more - there) for more, there in zip(to.shape, array.shape, strict=True)])

        cache = jax.eval_shape(partial(self.steps.cache, rows, slots))
        past = jax.ShapeDtypeStruct((rows, width, slots), jnp.bool_)
        return search._replace(cache=jax.tree.map(fill, search.cache, cache), past=fill(search.past, past))

    # One step

    def _step(self, prepared: Any, sources: Sources, numbers: Array, search: Search) -> Search:
        c = self.config
        now = search.rows
        slots = search.past.shape[2]
        # A free row computes something too; it must be finite, since its slots are only masked out later.
        age = jnp.where(numbers >= 0, search.step - now.began, 0)
        free, places = jax.lax.top_k(_free(search.past).astype(jnp.float32), c.width)  # the first ones
        places = jnp.where(free > 0, places, slots)
        past = search.past | (places[..., None] == jnp.arange(slots)[None, None])
        history, coverage = now.history, now.coverage
        if history is not None:
            now_read = jnp.arange(history.shape[2])[None, None] == age[:, None, None]
            history = jnp.where(now_read, now.tokens[..., None], history)
        logits, cache, attention = self.steps.step(
            prepared, sources.memory, search.cache, now.tokens, age, places, past
        )
        if coverage is not None:
            coverage = coverage + attention[-1].mean(axis=1)
        moment = _moment(sources.prefix, age)
        if c.searches:
            choice = self._search(sources, now, logits, history, coverage, moment)
            at_parent = choice.parents[..., None]
            past = jnp.take_along_axis(past, at_parent, axis=1)
            history, coverage = (
                None if x is None else jnp.take_along_axis(x, at_parent, axis=1) for x in (history, coverage)
            )
        else:
            choice = self._follow(numbers, now, logits, history, moment)
        record = (search.step % len(search.chosen), 0, 0)
        return Search(
            step=search.step + 1,
            cache=cache,
            chosen=jax.lax.dynamic_update_slice(search.chosen, choice.tokens[None], record),
            parents=jax.lax.dynamic_update_slice(search.parents, choice.parents[None], record),
            past=past,
            rows=now._replace(
                tokens=choice.tokens,
                scores=choice.scores,
                history=history,
                coverage=coverage,
                ended=choice.ended,
                open=choice.open,
            ),
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
            again = _completions(history, moment.age, c.no_repeat_ngram)
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
            scores = scores.at[..., np.array(c.suppressed)].set(-jnp.inf)
        return scores

    # Greedy and sampling

    def _follow(self, numbers: Array, rows: Rows, logits: Array, history: Array | None, moment: Moment) -> Choice:
        """Each hypothesis gets one more token, the best one or one that is drawn."""
        c = self.config
        scores = self._restrict(logits, jnp.zeros_like(rows.scores), history, moment)
        if c.sample:
            scores = _narrowed(scores / c.temperature, c.top_k, c.top_p)
            draw = jax.vmap(jax.vmap(jax.random.categorical))
            tokens = draw(_keys(c.seed, numbers, c.width, moment.age), scores)
        else:
            tokens = scores.argmax(axis=-1)
        given = moment.given[:, None] >= 0
        tokens = jnp.where(given, moment.given[:, None], tokens).astype(jnp.int32)
        gained = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
        totals = rows.scores + jnp.where(given, 0.0, gained)
        last = ((tokens == self.eos_id) | (moment.length == c.max_length)[:, None]) & ~given
        own = jnp.broadcast_to(jnp.arange(c.width, dtype=jnp.int32)[None], tokens.shape)
        step = jnp.broadcast_to(moment.age[:, None], tokens.shape)
        new = Ended(totals / self._penalty(moment.length)[:, None], step, own, tokens, last)
        first = last & ~rows.ended.valid
        ended = Ended(*(jnp.where(first, a, b) for a, b in zip(new, rows.ended, strict=True)))
        return Choice(tokens, totals, own, ended, rows.open & ~ended.valid.all(axis=1, keepdims=True))

    # Beam search

    def _search(
        self,
        sources: Sources,
        rows: Rows,
        logits: Array,
        history: Array | None,
        coverage: Array | None,
        moment: Moment,
    ) -> Choice:
        """The best of all continuations of all hypotheses, group by group."""
        c = self.config
        size = c.beam // c.diverse_groups
        # Log probabilities are gains - norm; computed of the candidates alone, where no rule needs them of all words.
        norm = jax.nn.logsumexp(logits, axis=-1)
        if c.repetition_penalty != 1.0:
            logits, norm = logits - norm[..., None], jnp.zeros_like(norm)
        logits, norm = jax.lax.optimization_barrier((logits, norm))  # or suppressing would copy what is still needed
        gains = self._restrict(logits, norm, history, moment)
        if c.renormalise:
            norm = jax.nn.logsumexp(gains, axis=-1)
        bonus = jnp.zeros(rows.scores.shape, jnp.float32)
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
            ended = Ended(*(x[:, part] for x in rows.ended))
            choices.append(
                self._search_group(
                    own, norm[:, part], rows.scores[:, part], bonus[:, part], ended, rows.open[:, group], moment
                )
            )

        if len(choices) == 1:
            return choices[0]._replace(open=choices[0].open[:, None])
        for group, choice in enumerate(choices):
            # From the group's own numbers to the row's; those that ended before have the row's already.
            new = choice.ended.steps == moment.age[:, None]
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
        values, parents, words = continuations(gains, norm, scores, min(2 * size, size * gains.shape[-1]))
        final = (moment.length == c.max_length)[:, None]
        last = (words == self.eos_id) | final

        running, order = jax.lax.top_k(values + jnp.where(last, LOW, 0.0), size)
        tokens, sources = (jnp.take_along_axis(x, order, axis=1) for x in (words, parents))

        # What ends counts if it is among the best k, where the group is still open.
        scored = values / self._penalty(moment.length)[:, None] + jnp.take_along_axis(bonus, parents, axis=1)
        counts = last & (jnp.arange(values.shape[1]) < size)[None] & open_[:, None]
        step = jnp.broadcast_to(moment.age[:, None], values.shape)
        new = Ended(jnp.where(counts, scored, LOW), step, parents, words, counts)
        both = Ended(*(jnp.concatenate([a, b], axis=1) for a, b in zip(ended, new, strict=True)))
        best = jax.lax.top_k(both.scores, size)[1]
        merged = Ended(*(jnp.take_along_axis(x, best, axis=1) for x in both))

        # May what is running still become better than the worst that has ended?
        longest = (
            jnp.int32(c.max_length) if c.early_stopping == "exhaustive" and c.length_penalty > 0 else moment.length
        )
        possible = running[:, :1] / jnp.broadcast_to(self._penalty(longest), moment.length.shape)[:, None]
        worst = jnp.where(merged.valid, merged.scores.min(axis=1, keepdims=True), LOW)
        still = open_ & (possible > worst).any(axis=1) & ~final[:, 0]
        if c.early_stopping == "first":
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


def _free(past: Array) -> Array:
    """The slots that no hypothesis descends from, [R, X] bool."""
    return ~past.any(axis=1)


def _moment(prefix: Array, age: Array) -> Moment:
    length = age + 1 - (prefix >= 0).sum(axis=1, dtype=jnp.int32)
    if not prefix.shape[1]:
        return Moment(age, jnp.full(length.shape, -1, jnp.int32), length)
    token = jnp.take_along_axis(prefix, jnp.minimum(age, prefix.shape[1] - 1)[:, None], axis=1)[:, 0]
    return Moment(age, jnp.where(age < prefix.shape[1], token, -1), length)


def continuations(gains: Array, norm: Array, scores: Array, count: int) -> tuple[Array, Array, Array]:
    """The best continuations of a row's hypotheses.

    The `count` largest of (gains [R, k, V] - norm [R, k]) + scores [R, k] of each row, best first, as three arrays
    [R, count]: the values, the hypotheses and the words. They all lie in the `count` columns of words with the largest
    maxima, which one pass without branches finds; a sort of everything takes a CPU three times as long.
    """
    rows, k, words = gains.shape
    columns = _columns(words, math.isqrt(words * count // k))  # as many to sort as there are words in those chosen
    lines = -(-words // columns)
    whole = words // columns * columns
    tops = gains[..., :whole].reshape(rows, k, -1, columns).max(axis=2)
    if whole < words:
        rest = gains[..., whole:]
        tops = tops.at[..., : words - whole].max(rest)
    tops = tops - norm[..., None] + scores[..., None]
    tops, best = jax.lax.top_k(tops.reshape(rows, -1), count)
    if lines == 1:
        return tops, best // columns, best % columns
    parents = jnp.repeat(best // columns, lines, axis=1)
    inside = (best % columns)[..., None] + columns * jnp.arange(lines)[None, None]
    inside = inside.reshape(rows, -1)
    places = jnp.where(inside < words, parents * words + inside, k * words)
    values = jnp.take_along_axis(gains.reshape(rows, -1), places, axis=1, mode="fill", fill_value=-jnp.inf)
    values = values - jnp.take_along_axis(norm, parents, axis=1) + jnp.take_along_axis(scores, parents, axis=1)
    values, at = jax.lax.top_k(values, count)
    return values, jnp.take_along_axis(parents, at, axis=1), jnp.take_along_axis(inside, at, axis=1)


def _columns(words: int, target: int) -> int:
    """Columns to divide words into: all for few words, else about `target`; a divisor spares a copy."""
    if words <= LARGEST_SORT:
        return words
    divisors = [number for number in range(target // 3, 3 * target) if words % number == 0]
    return min(divisors, key=lambda number: abs(math.log(number / target)), default=target)


LARGEST_SORT = 256
"""Words up to which `continuations` sorts all of them."""


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


def _completions(history: Array, age: Array, size: int) -> Array:
    """The tokens that followed the newest size - 1 tokens wherever these stood before; [R, K, T], -1 for none."""
    length = history.shape[2]
    if length < size:
        return jnp.full_like(history, -1)
    starts = length - size + 1
    follows = jnp.broadcast_to((age + 2 >= size)[:, None, None], (*history.shape[:2], starts))
    for i in range(size - 1):
        place = jnp.maximum(age - size + 2 + i, 0)[:, None, None]
        follows &= history[..., i : i + starts] == jnp.take_along_axis(history, place, axis=2)
    return jnp.where(follows, history[..., size - 1 :], -1)


def _keys(seed: int, numbers: Array, width: int, age: Array) -> Array:
    """A key for each [R, K]: of the seed, the sentence, its age and the sample."""
    of_row = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)
    of_row = jax.vmap(jax.random.fold_in)(of_row, age)
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
