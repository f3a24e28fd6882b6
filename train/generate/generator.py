"""Generate text by greedy search, beam search or sampling, with any model that reads tokens one at a time.

    generate = Generator(model, params, DecodeConfig(beam=5))
    hypotheses = generate([[4, 8, 2], [15, 16, 23, 42, 2]])  # sources of an encoder-decoder, or prompts of a decoder

`search` chooses the next tokens, `batch` runs a search on the device, `scheduler` forms the batches. On a CPU with few
cores, each core searches its own sentences: matrix products this small are faster on one core than spread over several.
Settings of JAX's context managers in the caller's thread do not apply in these threads.
"""

import copy
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

import jax

from ...data.cores import usable_cores
from ..errors import RunError
from .batch import Programs
from .config import DecodeConfig
from .scheduler import Hypothesis, Request, Sizes, Watch, search_sentences

__all__ = ["Generator", "Hypothesis", "Watch"]


class Generator:
    """Generate token ids.

    Attributes:
        config: options of the search.
        prepared: the parameters, in the form for incremental decoding.
    """

    ROWS_PER_THREAD = 32  # minimum number of sentences per core

    def __init__(self, model: Any, params: Any, config: DecodeConfig, *, rows: int = 64) -> None:
        """Create a generator; nothing is compiled yet.

        Args:
            model: a model with a method `incremental()` (`batch.IncrementalModel`).
            params: its parameters, unboxed.
            config: options of the search.
            rows: maximum number of sentences searched at a time.

        Raises:
            RunError: an output could be longer than the model has positions, or the model lacks a requested token, or
                a memory.
        """
        if rows < 1:
            raise RunError(f"rows: expected at least 1, found {rows}")
        self.config = config
        try:
            self._model = model.incremental()
        except ValueError as error:
            raise RunError(str(error)) from None
        positions, words = self._model.positions, self._model.vocabulary
        if positions is not None and config.max_length > positions:
            raise RunError(f"max_length {config.max_length}: the model has {positions} positions")
        if any(not 0 <= token < words for token in config.suppressed):
            raise RunError(f"suppressed: expected tokens from 0 to {words - 1}, found {config.suppressed}")
        if self._model.forced_eos_id in config.suppressed:
            raise RunError(f"suppressed: {self._model.forced_eos_id} ends this model's longest outputs")
        if self._model.forced_bos_id in config.suppressed:
            raise RunError(f"suppressed: {self._model.forced_bos_id} begins this model's outputs")
        if config.coverage_penalty and self._model.start_id is None:
            raise RunError("coverage_penalty: this model continues prompts; it has no source that could be covered")
        cores = usable_cores() if jax.default_backend() == "cpu" else 1
        self._threads = max(1, min(cores, rows // self.ROWS_PER_THREAD))
        self.sizes = Sizes.up_to(rows // self._threads, positions)
        one_core = {"xla_cpu_multi_thread_eigen": False} if self._threads == cores > 1 else None
        self.programs = Programs(self._model, config, one_core)
        self.prepared = self._model.prepare(jax.device_put(params))

    def with_params(self, params: Any) -> "Generator":
        """Return a generator with the same compiled programs and other parameters, for a model in training."""
        other = copy.copy(self)
        other.prepared = self._model.prepare(jax.device_put(params))
        return other

    @property
    def compilations(self) -> int:
        """Number of programs compiled so far."""
        return self.programs.compilations

    def __call__(
        self,
        sources: Sequence[Sequence[int]],
        prefixes: Sequence[Sequence[int]] | None = None,
        *,
        first: int = 0,
        watch: Watch | None = None,
    ) -> list[list[Hypothesis]]:
        """Generate an output for each source.

        Args:
            sources: token ids for the encoder, including the end token; for a model without an encoder, the prompts,
                which are not part of the outputs.
            prefixes: the first token ids of each output, possibly empty; None for none.
            first: number of the first sentence, if these are a part of many: random draws depend on the number.
            watch: follows the outputs as they are made and may end them; only for a single hypothesis of each source.

        Returns:
            up to `n_best` hypotheses for each, best first; samples in the order of drawing.

        Raises:
            RunError: a source is empty, or the model has too few positions for it; with its number.
        """
        if watch is not None and self.config.width > 1:
            raise RunError("watch: beams and several samples cannot be followed; it needs beam 1 and n_best 1")
        count = len(sources)
        prefixes = [[] for _ in range(count)] if prefixes is None else prefixes
        self._check(sources, prefixes)
        start = self._model.start_id
        starts = [source[-1] if start is None else start for source in sources]
        sources = [source[:-1] for source in sources] if start is None else sources
        longest = max(map(len, prefixes), default=0)
        tokens = self.sizes.tokens
        request = Request(
            sources,
            starts,
            prefixes,
            first,
            tokens(longest),
            tokens(longest + self.config.max_length),
            {},
            threading.Event(),
            watch,
        )
        self._search(request, sorted(range(count), key=lambda i: -len(sources[i])))
        return [request.found[i] for i in range(count)]

    def _check(self, sources: Sequence[Sequence[int]], prefixes: Sequence[Sequence[int]]) -> None:
        if len(prefixes) != len(sources):
            raise RunError(f"{len(sources)} sources, but {len(prefixes)} prefixes")
        positions, longest = self._model.positions, self.config.max_length
        for number, (source, prefix) in enumerate(zip(sources, prefixes, strict=True)):
            if not 0 < len(source) <= (positions or len(source)):
                wanted = "at least 1 token" if positions is None else f"1 to {positions} tokens"
                raise RunError(f"source {number}: expected {wanted}, found {len(source)}")
            before = len(prefix) + (len(source) if self._model.start_id is None else 0)
            if positions is not None and before + longest > positions:
                what = "prefix" if self._model.start_id is not None else "prompt"
                raise RunError(
                    f"{what} {number}: {before} tokens and max_length {longest} more do not fit the model's "
                    f"{positions} positions"
                )

    def _search(self, request: Request, order: Sequence[int]) -> None:
        """Search all sentences, in several threads if there are enough."""

        def search(sentences: Sequence[int]) -> None:
            search_sentences(self.programs, self.prepared, self.sizes, request, sentences)

        threads = min(self._threads, -(-len(order) // self.ROWS_PER_THREAD))
        if threads < 2:
            search(order)
            return
        with ThreadPoolExecutor(threads) as pool:
            try:
                # The sentences of each thread are fixed beforehand, so that the same ones always share a batch.
                searches = [pool.submit(search, order[thread::threads]) for thread in range(threads)]
                wait(searches, return_when=FIRST_EXCEPTION)
                for finished in searches:
                    if finished.done():
                        finished.result()
            finally:
                request.cancelled.set()  # ends the other threads if there was an error
