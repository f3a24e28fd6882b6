"""Schedule sentences into batches: the host's side of a search.

`search_sentences` takes sentences in order of their lengths and forms batches. A batch advances on the device until
enough of its sentences are finished; then their outputs are collected, and others take their rows. Compiled programs
depend only on a few sizes, to which lengths and counts are rounded up.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .batch import BatchState, Programs, Sources
from .search import NOTHING, Finished

NEVER = (1 << 31) - 1
"""A step that no batch reaches."""


class Hypothesis(NamedTuple):
    """One output."""

    tokens: list[int]  # without the start token and the end token
    score: float  # log probability of the generated tokens (without a prefix), with the penalties


@dataclass(frozen=True)
class Sizes:
    """Sizes for which programs are compiled.

    Each takes seconds to compile, so there are few: rows and slots go in steps of four, tokens in steps of two.

    Attributes:
        rows: possible numbers of rows of a batch, in descending order.
        positions: maximum number of tokens that the model reads; None for no limit.
    """

    FIRST_SLOTS: ClassVar[int] = 64  # initial slots of a sentence; more if they last for fewer than
    FIRST_STEPS: ClassVar[int] = 16  # this many steps of all its beams, or if they are fewer than
    SLOTS_PER_TOKEN: ClassVar[int] = 2  # this many per source token
    POSTPONABLE: ClassVar[int] = 32  # at most one sentence in this many starts again elsewhere for want of slots
    FEWEST_ROWS: ClassVar[int] = 4
    FEWEST_TOKENS: ClassVar[int] = 32

    rows: tuple[int, ...]
    positions: int | None

    @classmethod
    def up_to(cls, rows: int, positions: int | None) -> "Sizes":
        """Return the sizes for batches of at most `rows` sentences."""
        counts = [rows]
        while counts[-1] // 4 >= cls.FEWEST_ROWS:
            counts.append(counts[-1] // 4)
        return cls(tuple(counts), positions)

    def tokens(self, length: int) -> int:
        """Round up a number of tokens; 0 stays 0."""
        if not length:
            return 0
        rounded = max(self.FEWEST_TOKENS, 1 << (length - 1).bit_length())
        return rounded if self.positions is None else min(self.positions, rounded)

    def slots(self, width: int, source_length: int, max_tokens: int, *, more: bool) -> list[int]:
        """Return the numbers of slots of a sentence: initially, then at each increase; the last one always suffices."""
        first = max(self.FIRST_SLOTS, self.FIRST_STEPS * width, self.SLOTS_PER_TOKEN * source_length)
        most = max_tokens * width
        slots = [min(most, 4 * first if more else first)]
        while slots[-1] < most:
            slots.append(min(most, 4 * slots[-1]))
        return slots


class Watch(NamedTuple):
    """Someone who follows outputs as they are made, of one independent hypothesis each."""

    seen: Callable[[int, list[int], bool], bool]
    """called with a sentence's index, its new tokens without the end token, and whether it is finished; returns whether
    to end it"""
    every: int
    """number of steps between calls"""


class Request(NamedTuple):
    """A request for outputs, and the outputs found so far."""

    sources: Sequence[Sequence[int]]  # without their last tokens if outputs continue them
    starts: Sequence[int]  # the token that each output starts from
    prefixes: Sequence[Sequence[int]]  # the tokens that follow it
    first: int  # number of the first sentence
    prefix_length: int  # of the longest prefix, rounded up
    max_tokens: int  # of the longest output, including its prefix, rounded up
    found: dict[int, list[Hypothesis]]
    cancelled: threading.Event
    watch: Watch | None


def search_sentences(programs: Programs, prepared: Any, sizes: Sizes, request: Request, order: Sequence[int]) -> None:
    """Fill the request's `found` for some of its sentences.

    Args:
        programs: the compiled programs.
        prepared: the model's parameters.
        sizes: the sizes to choose from.
        request: the request.
        order: indices of the sentences, longest source first.
    """
    waiting, postponed = list(order), list[int]()
    while waiting and not request.cancelled.is_set():
        length = sizes.tokens(len(request.sources[waiting[0]]))
        alike = sum(sizes.tokens(len(request.sources[i])) == length for i in waiting)
        rows = min((size for size in sizes.rows if size >= alike), default=sizes.rows[0])
        # If the sentences of this length leave rows free, shorter ones take them.
        refill = Batch.refill(rows)
        count = max(rows, -(-alike // refill) * refill)
        postponed += Batch(programs, prepared, sizes, request, waiting[:count], rows, length).search()
        waiting = waiting[count:]
    if postponed and not request.cancelled.is_set():
        # They start again in one batch of few rows, in which padding to the longest source costs little.
        longest = sizes.tokens(len(request.sources[order[0]]))
        Batch(programs, prepared, sizes, request, postponed, sizes.rows[-1], longest, more_slots=True).search()


class Batch:
    """Sentences that share the rows of a batch.

    Args:
        programs: the compiled programs.
        prepared: the model's parameters.
        sizes: the sizes to choose from.
        request: the request that the sentences belong to.
        waiting: indices of the sentences in the request.
        rows: number of sentences searched at a time.
        length: length of the longest source in tokens, rounded up.
        more_slots: whether these sentences are known to need many slots.
    """

    def __init__(
        self,
        programs: Programs,
        prepared: Any,
        sizes: Sizes,
        request: Request,
        waiting: list[int],
        rows: int,
        length: int,
        *,
        more_slots: bool = False,
    ) -> None:
        self._programs, self._prepared, self._request, self._waiting = programs, prepared, request, waiting
        self._length = length
        self._slots = sizes.slots(programs.config.width, length, request.max_tokens, more=more_slots)
        # Whoever watches an output sees its tokens once.
        self._may_postpone = rows > sizes.rows[-1] and request.watch is None
        self._numbers = np.full(rows, -1, np.int32)  # index of the sentence in each row
        self._started = np.zeros(rows, np.int32)  # the step at which each was admitted
        self._seen = np.zeros(rows, np.int32)  # number of tokens of each that were shown to the request's watch
        self._step = 0
        self._admitted = 0  # number of sentences

    @staticmethod
    def refill(rows: int) -> int:
        """Return the number of rows to fill at a time."""
        return max(1, rows // 4)

    def search(self) -> list[int]:
        """Fill the request's `found`, and return the sentences that must be searched again in a smaller batch.

        These few need more slots, which would have to be added to all rows here. If they are not few, as for a model
        whose beams have little in common, all rows get more.
        """
        programs, request, postponed = self._programs, self._request, list[int]()
        rows = len(self._numbers)
        refill = self.refill(rows)
        sources, state = programs.empty(
            self._prepared, rows, self._length, request.prefix_length, request.max_tokens, self._slots[0]
        )
        while (self._waiting or (self._numbers >= 0).any()) and not request.cancelled.is_set():
            free = np.flatnonzero(self._numbers < 0)
            while self._waiting and len(free) >= refill:
                sources, state = self._admit(sources, state, free[:refill])
                free = free[refill:]
            # While others wait, rows are refilled some at a time; the last sentences finish in their rows.
            enough = np.int32(rows - refill if self._waiting else 0)
            numbers = np.where(self._numbers < 0, -1, self._numbers + request.first)
            until = np.int32(NEVER if request.watch is None else self._step + request.watch.every)
            state = programs.advance(self._prepared, sources, state, numbers, enough, until)
            hypotheses = state.rows.hypotheses
            step, history, active, *found = jax.device_get(
                (state.step, state.history, hypotheses.active, hypotheses.finished, state.tokens, state.parents)
            )
            self._step = int(step)
            if request.watch is not None:
                state = self._show(request.watch, state, active, *found)
                active = active & (self._numbers >= 0)[:, None]
            self._collect(np.flatnonzero(~active.any(axis=1) & (self._numbers >= 0)), *found)
            needed = np.where(self._numbers < 0, 0, history.any(axis=1).sum(axis=1) + programs.config.width)
            short = np.flatnonzero(needed > history.shape[2])
            few = len(short) <= refill and len(postponed) + len(short) <= self._admitted // Sizes.POSTPONABLE
            if len(short) and few and self._may_postpone:
                postponed += self._numbers[short].tolist()
                state = self._abandon(state, active, short)
            elif len(short):
                state = programs.widen(state, next(slots for slots in self._slots if slots >= needed.max()))
        return postponed

    def _admit(self, sources: Sources, state: BatchState, places: np.ndarray) -> tuple[Sources, BatchState]:
        """Admit as many waiting sentences as there are places."""
        count = len(places)
        admitted, self._waiting = self._waiting[:count], self._waiting[count:]
        self._admitted += len(admitted)
        self._numbers[places[: len(admitted)]] = admitted
        self._started[places[: len(admitted)]] = self._step
        self._seen[places[: len(admitted)]] = 0
        request = self._request
        ids = _padded([request.sources[i] for i in admitted], count, self._length)
        start = _padded([[request.starts[i]] for i in admitted], count, 1)[:, 0]
        prefix = _padded([request.prefixes[i] for i in admitted], count, request.prefix_length)
        rows = np.where(np.arange(count) < len(admitted), places, len(self._numbers)).astype(np.int32)
        return self._programs.admit(self._prepared, sources, state, np.int32(self._step), ids, start, prefix, rows)

    def _show(
        self, watch: Watch, state: BatchState, active: np.ndarray, best: Finished, tokens: np.ndarray, _: np.ndarray
    ) -> BatchState:
        """Show new tokens to the watch, and end the outputs that it has seen enough of."""
        eos_id, ended = self._programs.model.eos_id, list[int]()
        for row in np.flatnonzero(self._numbers >= 0):
            goes_on = bool(active[row].any())
            count = self._step - self._started[row] if goes_on else int(best.steps[row, 0]) + 1
            output = [int(tokens[(self._started[row] + age) % len(tokens), row, 0]) for age in range(count)]
            if not goes_on and output[-1:] == [eos_id]:
                output = output[:-1]
            sentence = int(self._numbers[row])
            if watch.seen(sentence, output[self._seen[row] :], not goes_on) and goes_on:
                total = float(state.rows.hypotheses.scores[row, 0])
                score = total / float(self._programs.search.normaliser(jnp.int32(count)))
                self._request.found[sentence] = [Hypothesis(output, score)]
                ended.append(int(row))
            self._seen[row] = len(output)
        return self._abandon(state, active, np.array(ended, np.int32)) if ended else state

    def _abandon(self, state: BatchState, active: np.ndarray, rows: np.ndarray) -> BatchState:
        """Free rows whose sentences are not finished."""
        self._numbers[rows] = -1
        active = active.copy()
        active[rows] = False
        hypotheses = state.rows.hypotheses._replace(active=jax.device_put(active))
        return state._replace(rows=state.rows._replace(hypotheses=hypotheses))

    def _collect(self, rows: np.ndarray, best: Finished, tokens: np.ndarray, parents: np.ndarray) -> None:
        """Follow the finished hypotheses of `rows` back to their beginnings, and free the rows."""
        config, eos_id = self._programs.config, self._programs.model.eos_id
        for row in rows:
            order = range(config.n_best)
            if config.diverse_groups > 1:
                order = np.argsort(-best.scores[row], kind="stable")[: config.n_best]
            hypotheses = []
            for i in order:
                if not best.scores[row, i] > NOTHING:
                    break
                output, parent = [int(best.tokens[row, i])], best.parents[row, i]
                for age in range(best.steps[row, i] - 1, -1, -1):
                    slot = (self._started[row] + age) % len(tokens)
                    output.append(int(tokens[slot, row, parent]))
                    parent = parents[slot, row, parent]
                if output[0] == eos_id:
                    output = output[1:]
                hypotheses.append(Hypothesis(output[::-1], float(best.scores[row, i])))
            # The rules may forbid every word.
            self._request.found[int(self._numbers[row])] = hypotheses or [Hypothesis([], -math.inf)]
        self._numbers[rows] = -1


def _padded(lists: Sequence[Sequence[int]], rows: int, length: int) -> np.ndarray:
    """Return the lists as [rows, length] int32, padded with -1."""
    array = np.full((rows, length), -1, np.int32)
    for row, tokens in zip(array, lists, strict=False):
        row[: len(tokens)] = tokens
    return array
