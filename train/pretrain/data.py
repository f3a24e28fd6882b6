"""The text of a pretraining run: its tokenizer, its tokenised cache, and the batches of its phases."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from ...data import (
    EMBEDDED,
    Corpus,
    DocumentStore,
    Tokenizer,
    build_documents,
    load_tokenizer,
    train_tokenizer,
    training_batches,
)
from ...data.cloud.caches import build_once
from ...data.corpus.document_store import Split, Unit
from ...data.corpus.fingerprint import corpus_fingerprint
from ...data.files import user_cache_folder
from ...data.tokenizers.kinds import TITLES, TextKind
from ..errors import RunError
from ..progress import Progress
from ..sharding import first_process_first
from .config import Phase, PretrainConfig
from .model import asked_family
from .objective import Objective, RowSource


class Data(NamedTuple):
    """The tokenised text of a run."""

    tokenizer: Tokenizer
    train: DocumentStore
    validation: DocumentStore  # the training store itself if a fraction of its documents is held out


def prepare_tokenizer(config: PretrainConfig, progress: Progress) -> Tokenizer:
    """Load the tokenizer; if none is given, process 0 trains one on the corpus if it is missing."""
    if config.tokenizer_folder is not None:
        return load_tokenizer(config.tokenizer_folder)
    with first_process_first("tokenizer_prepared"):
        return load_tokenizer(trained_tokenizer(config, _corpora(config)[0], progress))


def prepare_data(config: PretrainConfig, tokenizer: Tokenizer, progress: Progress, unit: Unit) -> Data:
    """Open the cache of the tokenised text; process 0 builds it if it is missing, before the others open it."""
    with first_process_first("data_prepared"):
        build = partial(
            build_documents,
            tokenizer=tokenizer,
            root=(config.cache or user_cache_folder()) / "tokenised",
            language=config.language,
            unit=unit,
            processes=config.workers or None,
            progress=lambda report: progress.update(str(report)),
        )
        corpus, held_out = _corpora(config)
        train = build(corpus)
        validation = train if held_out is None else build(held_out)
    return Data(tokenizer, train, validation)


def _corpora(config: PretrainConfig) -> tuple[Corpus, Corpus | None]:
    """Return the training text, and the held-out text if it is separate."""
    options: Any = {name: getattr(config, name) for name in ("encoding", "text_field", "blank_line", "verbatim")}
    held_out = Corpus(config.validation_corpus, **options) if config.validation_corpus else None
    return Corpus(config.corpus or (EMBEDDED,), **options), held_out


def trained_tokenizer(config: PretrainConfig, corpus: Corpus, progress: Progress) -> Path:
    """Return the folder of a tokenizer of this corpus, of the model family's kind, after training it if it is missing.

    Raises:
        RunError: tokenizers of this kind cannot be trained here.
    """
    family = asked_family(config)
    kind: Any = family.tokenizers[0]
    if kind not in get_args(TextKind):
        raise RunError(
            f"--model {config.model}: its kind of tokenizer, {TITLES[kind]}, is not trained here. "
            "Give one with --tokenizer."
        )

    def build(unfinished: Path) -> None:
        tokenizer = train_tokenizer(
            kind,
            corpus,
            vocab_size=config.vocab_size,
            family=family.tokenizer_like,
            lowercase=config.lowercase,
            progress=lambda report: progress.update(str(report)),
        )
        tokenizer.save(unfinished)

    lowercase = "" if kind == "byte-bpe" else f" {config.lowercase}"  # byte-level BPE keeps the text as it is
    key = f"{kind}{family.tokenizer_like or ''} {config.vocab_size}{lowercase} {corpus_fingerprint(corpus)}"
    root = (config.cache or user_cache_folder()) / "tokenizers"
    return build_once(root / hashlib.sha256(key.encode()).hexdigest()[:16], build)


def make_rows(
    config: PretrainConfig, data: Data, objective: Objective, length: int, split: Split = "train"
) -> RowSource:
    """Return rows of one sequence length: training rows, or held-out rows, which are the same for every seed."""
    training = split == "train"
    return objective.rows(
        data.train if training else data.validation,
        "all" if config.validation_corpus else split,
        sequence_length=length,
        seed=config.seed if training else 0,
        copies=(config.static_masks or None) if training else None,
        validation_fraction=config.validation_fraction,
    )


class PhasedBatches:
    """Training batches of all phases, one after the other. The state is JSON: the phase, and the position in it.

    Args:
        config: settings with the phases.
        data: the text.
        objective: the objective, which defines the rows.
        share: rows of a batch -> (index, count), see `Parallelism.share`.
    """

    def __init__(
        self, config: PretrainConfig, data: Data, objective: Objective, share: Callable[[int], tuple[int, int]]
    ):
        def batches(phase: Phase) -> Any:
            index, count = share(phase.rows)
            rows = make_rows(config, data, objective, phase.length)
            return training_batches(rows, batch_rows=phase.rows, host_index=index, host_count=count)

        self._phases, self._open = config.plan, batches
        self._phase, self._done, self._batches = 0, 0, batches(self._phases[0])

    def __next__(self) -> dict[str, np.ndarray]:
        while self._done == self._phases[self._phase].steps:
            self._phase, self._done = self._phase + 1, 0
            before, phase = self._batches, self._phases[self._phase]
            self._batches = self._open(phase)
            if phase.continued:
                self._batches.set_state(before.get_state())
        self._done += 1
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        return {"phase": self._phase, "done": self._done, "batches": self._batches.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        phase, done = state["phase"], state["done"]
        if phase >= len(self._phases) or done > self._phases[phase].steps:
            plan = ", ".join(f"{phase.steps} steps of {phase.length} tokens" for phase in self._phases)
            raise RunError(
                f"The saved position is after {done} steps of phase {phase + 1}; this run has {plan}. Give the same "
                "--phases, with more steps in the last one if you like."
            )
        if state["phase"] != self._phase:
            self._batches = self._open(self._phases[state["phase"]])
        self._phase, self._done = state["phase"], state["done"]
        self._batches.set_state(state["batches"])
