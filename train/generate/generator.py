"""Decoding: greedy, beam search and sampling, for every model that generates.

    generate = Generator(model, params, DecodeConfig(beam=5))
    hypotheses = generate([[4, 8, 2], [15, 16, 23, 42, 2]])  # token lists in, the n best of each out, in order

Sentences are sorted by length and searched many at a time, on the device (`search`). Where enough of them are finished,
the search comes back to the host, and others take their places. What is compiled depends on a few sizes, to which
lengths and counts are rounded up, never on the sentences.

On a CPU with few cores each searches sentences of its own: products this small are faster on one core than spread over
several. What JAX's context managers set in the caller's thread does not reach these.
"""

import copy
import math
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import numpy as np

from ...data.cores import usable_cores
from ..errors import RunError
from .config import DecodeConfig
from .search import NOTHING, Ended, Search, Searcher, Sources


class Hypothesis(NamedTuple):
    """One output."""

    tokens: list[int]  # without the start token and the end
    score: float  # log probability of what was generated (a prefix is not), divided by the length's penalty


class Task(NamedTuple):
    """What is to be generated, and what of it there is."""

    sources: Sequence[Sequence[int]]
    prefixes: Sequence[Sequence[int]]
    first: int  # the first source's number
    given: int  # tokens of the longest prefix, rounded up
    most: int  # tokens of the longest output, its prefix included, rounded up
    found: dict[int, list[Hypothesis]]
    cancelled: threading.Event


class Generator:
    """Generates from lists of tokens.

    Attributes:
        config: how.
        rows: most sentences searched at a time.
        row_sizes: how many rows a pool may have, the most first.
        prepared: the parameters in the form that the model's steps take.
    """

    # Every size takes seconds to compile, so there are few: rows and slots go in steps of four, tokens in steps of two.
    FIRST_SLOTS = 64  # slots of a sentence at first, or as for FIRST_STEPS steps or TOKEN_SLOTS a source token if more
    FIRST_STEPS = 16
    TOKEN_SLOTS = 2
    FEWEST_ROWS = 4  # fewer sentences are filled up
    FEWEST_TOKENS = 32  # a shorter source or prefix is filled up
    LANE_ROWS = 32  # sentences that are worth a core of their own

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
        if model.config.forced_eos_token_id in config.suppressed:
            raise RunError(f"suppressed: {model.config.forced_eos_token_id} is how this model's longest outputs end")
        cores = usable_cores() if jax.default_backend() == "cpu" else 1
        self._lanes = max(1, min(cores, rows // self.LANE_ROWS))
        self.row_sizes = [rows // self._lanes]
        while self.row_sizes[-1] // 4 >= self.FEWEST_ROWS:
            self.row_sizes.append(self.row_sizes[-1] // 4)
        one_core = {"xla_cpu_multi_thread_eigen": False} if self._lanes == cores > 1 else None
        self._searcher = Searcher(model.steps(), config, one_core)
        self._compiling = threading.Lock()  # or two threads would compile the same program
        self._compiled: set[Any] = set()  # programs, each with the sizes of its arguments
        self.prepared = self._searcher.steps.prepare(jax.device_put(params))

    def with_params(self, params: Any) -> "Generator":
        """The same programs with other parameters, as for a model in training."""
        other = copy.copy(self)
        other.prepared = self._searcher.steps.prepare(jax.device_put(params))
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
        order = sorted(range(len(sources)), key=lambda i: -len(sources[i]))
        given = max(map(len, prefixes), default=0)
        most = self._rounded(given + self.config.max_length)
        task = Task(sources, prefixes, first, self._rounded(given) if given else 0, most, {}, threading.Event())
        lanes = min(self._lanes, -(-len(order) // self.LANE_ROWS))
        if lanes < 2:
            self._search(task, order)
        else:
            with ThreadPoolExecutor(lanes) as pool:
                try:
                    # Shares are fixed beforehand, so that the same sentences always meet.
                    shares = [pool.submit(self._search, task, order[lane::lanes]) for lane in range(lanes)]
                    wait(shares, return_when=FIRST_EXCEPTION)
                    for share in shares:
                        if share.done():
                            share.result()
                finally:
                    task.cancelled.set()  # for those that are not done, if there was an error
        return [task.found[i] for i in range(len(sources))]

    def _search(self, task: Task, order: Sequence[int]) -> None:
        """Search sentences `order`, the longest first."""
        waiting, late = list(order), list[int]()
        while waiting and not task.cancelled.is_set():
            length = self._rounded(len(task.sources[waiting[0]]))
            alike = sum(self._rounded(len(task.sources[i])) == length for i in waiting)
            rows = min((size for size in self.row_sizes if size >= alike), default=self.row_sizes[0])
            # Where those of this length leave rows free, shorter ones sit in them.
            share = Pool.share(rows)
            count = max(rows, -(-alike // share) * share)
            late += Pool(self, task, waiting[:count], rows, length).search()
            waiting = waiting[count:]
        if late and not task.cancelled.is_set():
            # They begin anew in few rows, whose length hardly matters: one pool takes all, and none leaves it.
            longest = self._rounded(len(task.sources[order[0]]))
            Pool(self, task, late, self.row_sizes[-1], longest, late=True).search()

    def _rounded(self, length: int) -> int:
        return min(self.positions, max(self.FEWEST_TOKENS, 1 << (length - 1).bit_length()))


class Pool:
    """The host's side of searching some sentences.

    Args:
        generator: what for.
        task: what of.
        waiting: the sentences' places in the task.
        rows: how many are searched at a time.
        length: tokens of the longest source, rounded up.
        late: whether these are sentences that another pool had too few slots for.
    """

    def __init__(
        self, generator: Generator, task: Task, waiting: list[int], rows: int, length: int, *, late: bool = False
    ) -> None:
        self._generator, self._task, self._waiting = generator, task, waiting
        self._searcher, self._prepared = generator._searcher, generator.prepared
        width = generator.config.width
        first = max(generator.FIRST_SLOTS, generator.FIRST_STEPS * width, generator.TOKEN_SLOTS * length)
        self._slots = [min(task.most * width, 4 * first if late else first)]
        while self._slots[-1] < task.most * width:
            self._slots.append(min(task.most * width, 4 * self._slots[-1]))
        self._length = length
        self._numbers = np.full(rows, -1, np.int32)  # which sentence each row holds
        self._began = np.zeros(rows, np.int32)  # the step that each began with
        self._step = 0

    @staticmethod
    def share(rows: int) -> int:
        """How many of so many rows are filled at a time."""
        return max(1, rows // 4)

    def search(self) -> list[int]:
        """Fill the task's `found`, but for sentences that are returned: a pool of the fewest rows must begin them anew.

        They need more slots, which all rows here would have to be given, and they are few.
        """
        task, run, left = self._task, self._run, list[int]()
        rows = len(self._numbers)
        share = self.share(rows)
        sizes = (rows, self._length, task.given, task.most, self._slots[0])
        sources, search = self._searcher.clear(self._prepared, *sizes)
        while (self._waiting or (self._numbers >= 0).any()) and not task.cancelled.is_set():
            free = np.flatnonzero(self._numbers < 0)
            while self._waiting and len(free) >= share:
                sources, search = self._admit(sources, search, free[:share])
                free = free[share:]
            # As long as others wait, rows are filled again a share at a time; the last sentences end where they are.
            enough = np.int32(rows - share if self._waiting else 0)
            numbers = np.where(self._numbers < 0, -1, self._numbers + task.first)
            search = run(self._searcher.advance, self._prepared, sources, search, numbers, enough)
            step, past, open_, *found = jax.device_get(
                (search.step, search.past, search.rows.open, search.rows.ended, search.chosen, search.parents)
            )
            self._step = int(step)
            self._collect(np.flatnonzero(~open_.any(axis=1) & (self._numbers >= 0)), *found)
            needed = np.where(self._numbers < 0, 0, past.any(axis=1).sum(axis=1) + self._generator.config.width)
            short = np.flatnonzero(needed > past.shape[2])
            if 0 < len(short) <= share and rows > self._generator.row_sizes[-1]:
                left += self._numbers[short].tolist()
                search = self._close(search, open_, short)
            elif len(short):
                slots = next(slots for slots in self._slots if slots >= needed.max())
                search = run(self._searcher.widen, search, slots)
        return left

    def _admit(self, sources: Sources, search: Search, places: np.ndarray) -> tuple[Sources, Search]:
        """Seat as many of those that wait as there are places."""
        count = len(places)
        come, self._waiting = self._waiting[:count], self._waiting[count:]
        self._numbers[places[: len(come)]] = come
        self._began[places[: len(come)]] = self._step
        taken = np.arange(count) < len(come)
        ids = _filled([self._task.sources[i] for i in come], count, self._length)
        prefix = _filled([self._task.prefixes[i] for i in come], count, self._task.given)
        rows = np.where(taken, places, len(self._numbers)).astype(np.int32)
        arguments = (sources, search.rows, np.int32(self._step), ids, taken, prefix, rows)
        sources, seated = self._run(self._searcher.admit, self._prepared, *arguments)
        return sources, search._replace(rows=seated)

    def _close(self, search: Search, open_: np.ndarray, rows: np.ndarray) -> Search:
        """Free rows whose sentences leave unfinished."""
        self._numbers[rows] = -1
        open_ = open_.copy()
        open_[rows] = False
        return search._replace(rows=search.rows._replace(open=jax.device_put(open_)))

    def _collect(self, rows: np.ndarray, best: Ended, chosen: np.ndarray, parents: np.ndarray) -> None:
        """Follow the finished hypotheses of `rows` back to their beginnings, and free the rows."""
        config, eos_id = self._generator.config, self._searcher.eos_id
        for row in rows:
            order = range(config.n_best)
            if config.diverse_groups > 1:
                order = np.argsort(-best.scores[row], kind="stable")[: config.n_best]
            hypotheses = []
            for i in order:
                if not best.scores[row, i] > NOTHING:
                    break
                tokens, parent = [int(best.tokens[row, i])], best.parents[row, i]
                for age in range(best.steps[row, i] - 1, -1, -1):
                    slot = (self._began[row] + age) % len(chosen)
                    tokens.append(int(chosen[slot, row, parent]))
                    parent = parents[slot, row, parent]
                if tokens[0] == eos_id:
                    tokens = tokens[1:]
                hypotheses.append(Hypothesis(tokens[::-1], float(best.scores[row, i])))
            # The rules may leave no word that could come next.
            self._task.found[int(self._numbers[row])] = hypotheses or [Hypothesis([], -math.inf)]
        self._numbers[rows] = -1

    def _run(self, program: Any, *arguments: Any) -> Any:
        """Run a program. While one runs with new sizes, and so is compiled, no other thread starts a second such."""
        generator = self._generator
        sizes = (program, *(getattr(x, "shape", x) for x in jax.tree.leaves(arguments)))
        if sizes in generator._compiled:
            return program(*arguments)
        with generator._compiling:
            result = program(*arguments)
            generator._compiled.add(sizes)
            return result


def _filled(lists: Sequence[Sequence[int]], rows: int, length: int) -> np.ndarray:
    """[rows, length] int32, -1 where there is no token."""
    array = np.full((rows, length), -1, np.int32)
    for row, tokens in zip(array, lists, strict=False):
        row[: len(tokens)] = tokens
    return array
