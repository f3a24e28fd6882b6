"""Batches of sentences on the device: the KV cache that beams share, and the compiled programs.

A batch has R rows, each with a sentence or free. Sentences are admitted to free rows while others continue (continuous
batching), so that the sentences of a batch have different ages.

The beams of a sentence share one KV cache. Beams are reordered by permuting a boolean [beam, slot] mask of each beam's
history; the cache is never copied. At each step a beam writes the keys and values of its newest token to a slot that is
in no beam's history, and attention masks out the slots of other histories. The encoder's keys and values are thus read
once for all beams of a sentence, and the remaining work is matrix products. Few slots are enough, since beams share
most of their history, and the slots of a beam that dies are free again: five beams translating a caption of 13 words
use 17 slots on average, and hardly ever more than 75.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from .config import DecodeConfig
from .search import Hypotheses, Search, Step


class IncrementalModel(Protocol):
    """A model that reads one token at a time, as returned by a model's method `incremental()`.

    Its methods are pure functions; all but `prepare` can be traced. The first axis of every leaf of a memory or a cache
    is the rows.
    """

    @property
    def vocabulary(self) -> int:
        """Number of tokens, V."""
        ...

    @property
    def positions(self) -> int | None:
        """Maximum length in tokens of a source or an output, or of both together if outputs continue; None for any."""
        ...

    @property
    def start_id(self) -> int | None:
        """The token that every output starts from (encoder-decoder); None: an output continues its source (decoder).

        Then the last token of the source is the start token, and the rest is what `start` reads.
        """
        ...

    @property
    def eos_id(self) -> int:
        """The token that ends an output."""
        ...

    @property
    def forced_bos_id(self) -> int | None:
        """The token that every output must begin with; None for any."""
        ...

    @property
    def forced_eos_id(self) -> int | None:
        """The token that outputs of maximum length must end with; None for any."""
        ...

    def prepare(self, params: Any) -> Any:
        """Convert parameters to the form that the other methods take. It is not part of a compiled program."""
        ...

    def start(self, prepared: Any, input_ids: Array, segment_ids: Array) -> Any:
        """Read sources [B, S], with segment 1, or 0 for padding, and return their memory.

        S may be 0 if outputs continue their sources.
        """
        ...

    def cache(self, rows: int, slots: int) -> Any:
        """Return a cache. Only its shapes are used: it is initialised to zeros, and new slots are zeros."""
        ...

    def step(
        self, prepared: Any, memory: Any, cache: Any, tokens: Array, positions: Array, places: Array, mask: Array
    ) -> tuple[Array, Any, tuple[Array, ...]]:
        """Read one token of each hypothesis.

        Args:
            prepared: the parameters.
            memory: memory of the sources.
            cache: cache after the steps so far.
            tokens: [B, K] int32.
            positions: [B] int32, the position of each row's tokens.
            places: [B, K] int32, the slot to write each token to; the number of slots means none.
            mask: [B, K, slots] bool, the slots to attend to.

        Returns:
            (logits [B, K, V] float32, the cache, each layer's attention to the source [B, H, K, S])
        """
        ...


class Sources(NamedTuple):
    """Inputs of a batch's sentences."""

    memory: Any  # of the model
    mask: Array  # [R, S] bool, True for tokens
    prefix: Array  # [R, P] int32, the first tokens of the output, -1 after them


class Rows(NamedTuple):
    """The sentences of a batch."""

    started: Array  # [R] int32, the step before which each was admitted; its age is the number of steps since then
    hypotheses: Hypotheses


class BatchState(NamedTuple):
    """The state of a batch, for outputs of T tokens."""

    step: Array  # [] int32, steps of the batch so far
    cache: Any  # of the model
    tokens: Array  # [T, R, K] int32, at s mod T the token that each live hypothesis got at step s
    parents: Array  # [T, R, K] int32, the hypothesis that it was chosen for
    history: Array  # [R, K, slots] bool, the slots with the tokens of each live hypothesis
    rows: Rows


class Programs:
    """The compiled programs that search batches of one model, for several threads.

    Args:
        model: the model.
        config: options of the search.
        options: options for XLA's compiler, in addition to its flags.
    """

    def __init__(self, model: IncrementalModel, config: DecodeConfig, options: dict[str, Any] | None = None) -> None:
        self.model = model
        self.config = config
        self.compilations = 0
        self.search = Search(config, model.eos_id, model.forced_eos_id, model.forced_bos_id)
        self._shapes: dict[tuple[int, ...], tuple[Sources, BatchState]] = {}
        self._compiling = threading.Lock()  # or two threads would compile the same program
        self._compiled: set[Any] = set()  # programs with the shapes of their arguments
        self._admit_program = jax.jit(self._admit, donate_argnums=(1, 2), compiler_options=options)
        self._advance_program = jax.jit(self._advance, donate_argnums=2, compiler_options=options)
        self._widen_program = jax.jit(self._widen, static_argnums=1, compiler_options=options)

    def empty(
        self, prepared: Any, rows: int, source_length: int, prefix_length: int, max_tokens: int, slots: int
    ) -> tuple[Sources, BatchState]:
        """Return a batch of free rows. Creating its arrays one by one avoids compiling a program for these sizes."""
        sizes = (rows, source_length, prefix_length, max_tokens, slots)

        def describe(prepared: Any, ids: Array, start: Array, active: Array) -> tuple[Sources, BatchState]:
            sources = Sources(
                self.model.start(prepared, ids, ids), ids > 0, jnp.zeros((rows, prefix_length), jnp.int32)
            )
            record = jnp.zeros((max_tokens, rows, self.config.width), jnp.int32)
            history = jnp.zeros((rows, self.config.width, slots), bool)
            admitted = Rows(start, self.search.begin(start, active, source_length, max_tokens, self._continued(ids)))
            return sources, BatchState(jnp.int32(0), self.model.cache(rows, slots), record, record, history, admitted)

        if sizes not in self._shapes:
            ids = jax.ShapeDtypeStruct((rows, source_length), jnp.int32)
            start, active = jax.ShapeDtypeStruct((rows,), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.bool_)
            self._shapes[sizes] = jax.eval_shape(describe, prepared, ids, start, active)
        # The results of a free row are not used; but it must not be active, and its numbers must be finite.
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._shapes[sizes])

    def admit(
        self,
        prepared: Any,
        sources: Sources,
        state: BatchState,
        step: Any,
        ids: Any,
        start: Any,
        prefix: Any,
        places: Any,
    ) -> tuple[Sources, BatchState]:
        """Put sentences into free rows.

        Args:
            prepared: the model's parameters.
            sources: sources of the batch; not to be used afterwards.
            state: state of the batch; not to be used afterwards.
            step: [] int32, the state's step.
            ids: [N, S] int32, the sources, -1 for padding.
            start: [N] int32, the token that each output starts from, -1 for no sentence.
            prefix: [N, P] int32, the first tokens of each output, -1 after them.
            places: [N] int32, the rows, R for no sentence.
        """
        arguments = (prepared, sources, state.rows, step, ids, start, prefix, places)
        sources, rows = self._run(self._admit_program, *arguments)
        return sources, state._replace(rows=rows)

    def advance(
        self, prepared: Any, sources: Sources, state: BatchState, numbers: Any, enough: Any, until: Any
    ) -> BatchState:
        """Search until at most `enough` sentences are active, or step `until`, or until the host has to make room.

        Args:
            prepared: the model's parameters.
            sources: sources of the batch.
            state: state of the batch; not to be used afterwards.
            numbers: [R] int32, the number of the sentence in each row; -1 for a free row.
            enough: [] int32, number of active sentences at which to stop.
            until: [] int32, the batch's step at which to stop.
        """
        return self._run(self._advance_program, prepared, sources, state, numbers, enough, until)

    def widen(self, state: BatchState, slots: int) -> BatchState:
        """Increase the number of slots per row to `slots`."""
        return self._run(self._widen_program, state, slots)

    def _run(self, program: Callable[..., Any], *arguments: Any) -> Any:
        """Run a program. While it is compiled for new sizes, no other thread compiles one."""
        sizes = (program, *(getattr(x, "shape", x) for x in jax.tree.leaves(arguments)))
        if sizes in self._compiled:
            return program(*arguments)
        with self._compiling:
            result = program(*arguments)
            self._compiled.add(sizes)
            return result

    # Compiled functions

    def _admit(
        self,
        prepared: Any,
        sources: Sources,
        rows: Rows,
        step: Array,
        ids: Array,
        start: Array,
        prefix: Array,
        places: Array,
    ) -> tuple[Sources, Rows]:
        """Admit sentences, see `admit`. The program does not depend on the number of slots."""
        self.compilations += 1
        mask = ids >= 0
        memory = self.model.start(prepared, jnp.maximum(ids, 0), mask.astype(jnp.int32))
        looks_back = rows.hypotheses.history
        continued = self._continued(ids)
        max_tokens = 0 if looks_back is None else looks_back.shape[2] - (0 if continued is None else ids.shape[1])
        fresh = self.search.begin(jnp.maximum(start, 0), start >= 0, ids.shape[1], max_tokens, continued)
        new = Sources(memory, mask, prefix), Rows(jnp.broadcast_to(step, start.shape), fresh)
        return jax.tree.map(lambda old, new: old.at[places].set(new, mode="drop"), (sources, rows), new)

    def _advance(
        self, prepared: Any, sources: Sources, state: BatchState, numbers: Array, enough: Array, until: Array
    ) -> BatchState:
        self.compilations += 1

        def goes_on(state: BatchState) -> Array:
            # The host makes room if an active sentence has no slots left, or the record would lose an old token.
            active = state.rows.hypotheses.active.any(axis=1)
            full = _free(state.history).sum(axis=1) < self.config.width
            oldest = jnp.where(numbers >= 0, state.step - state.rows.started, 0).max()
            room = ~(active & full).any() & (oldest < len(state.tokens))
            return (active.sum() > enough) & room & (state.step < until)

        # A sentence that was just admitted has no history; the slots hold that of the sentence before it.
        begun = state.step > state.rows.started
        state = state._replace(history=state.history & begun[:, None, None])
        return jax.lax.while_loop(goes_on, partial(self._step, prepared, sources, numbers), state)

    def _step(self, prepared: Any, sources: Sources, numbers: Array, state: BatchState) -> BatchState:
        """Read the newest token of every hypothesis, and choose the next."""
        hypotheses = state.rows.hypotheses
        slots = state.history.shape[2]
        # Free rows are computed too; they must be finite, since their slots are only masked out later.
        age = jnp.where(numbers >= 0, state.step - state.rows.started, 0)
        free, places = jax.lax.top_k(_free(state.history).astype(jnp.float32), self.config.width)  # the first ones
        places = jnp.where(free > 0, places, slots)
        history = state.history | (places[..., None] == jnp.arange(slots)[None, None])
        logits, cache, attention = self.model.step(
            prepared, sources.memory, state.cache, hypotheses.tokens, age, places, history
        )
        read = age if self.model.start_id is not None else age + sources.mask.sum(axis=1, dtype=jnp.int32)
        step = _where(sources.prefix, age, read)
        hypotheses, parents = self.search.advance(hypotheses, step, logits, attention, sources.mask, numbers)
        if self.config.searches:
            history = jnp.take_along_axis(history, parents[..., None], axis=1)
        record = (state.step % len(state.tokens), 0, 0)
        return BatchState(
            step=state.step + 1,
            cache=cache,
            tokens=jax.lax.dynamic_update_slice(state.tokens, hypotheses.tokens[None], record),
            parents=jax.lax.dynamic_update_slice(state.parents, parents[None], record),
            history=history,
            rows=Rows(state.rows.started, hypotheses),
        )

    def _continued(self, ids: Array) -> Array | None:
        """Return the sources [N, S] if outputs continue them."""
        return ids if self.model.start_id is None else None

    def _widen(self, state: BatchState, slots: int) -> BatchState:
        self.compilations += 1
        rows, width, _ = state.history.shape

        def fill(array: Array, to: Any) -> Array:
            return jnp.pad(array, [(0, more - there) for more, there in zip(to.shape, array.shape, strict=True)])

        cache = jax.eval_shape(partial(self.model.cache, rows, slots))
        history = jax.ShapeDtypeStruct((rows, width, slots), jnp.bool_)
        return state._replace(cache=jax.tree.map(fill, state.cache, cache), history=fill(state.history, history))


def _free(history: Array) -> Array:
    """Return the slots [R, slots] that are in no hypothesis's history."""
    return ~history.any(axis=1)


def _where(prefix: Array, age: Array, read: Array) -> Step:
    """Return the position of sentences of these ages [R], after `read` [R] tokens, that begin with `prefix` [R, P]."""
    length = age + 1 - (prefix >= 0).sum(axis=1, dtype=jnp.int32)
    if not prefix.shape[1]:
        return Step(age, read, jnp.full(length.shape, -1, jnp.int32), length)
    token = jnp.take_along_axis(prefix, jnp.minimum(age, prefix.shape[1] - 1)[:, None], axis=1)[:, 0]
    return Step(age, read, jnp.where(age < prefix.shape[1], token, -1), length)
