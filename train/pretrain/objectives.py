"""The pretraining objectives, by name."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

from ...data import Tokenizer
from ...data.corpus.document_store import Unit
from ...models.family import Family
from ..errors import RunError
from .causal import NextTokens
from .config import DistillConfig, MaskingKind, PretrainConfig
from .denoising.denoise import Denoising
from .denoising.span_corruption import SpanCorruption
from .distill import Distillation
from .mlm import MaskedWords
from .mlm_pairs import MaskedWordsAndNextSentence, MaskedWordsAndSentenceOrder
from .objective import Objective
from .rtd import ReplacedTokens
from .span_sbo import MaskedSpans
from .streams.bilm import BothDirections
from .streams.causal_memory import NextTokensWithMemory


class ObjectiveClass(Protocol):
    """Interface of an objective's class."""

    @property
    def units(self) -> tuple[MaskingKind, ...]:
        """See `Objective.units`."""
        ...

    @property
    def own_rows(self) -> str | None:
        """See `Objective.own_rows`."""
        ...

    @property
    def text(self) -> Unit:
        """See `Objective.text`."""
        ...

    @property
    def learns(self) -> str | None:
        """See `Objective.learns`."""
        ...

    def create(self, config: PretrainConfig, tokenizer: Tokenizer) -> Objective:
        """Create the objective for a run's settings; raise RunError if they do not fit it."""
        ...


OBJECTIVES: Mapping[str, ObjectiveClass] = {
    "mlm": MaskedWords,
    "mlm+nsp": MaskedWordsAndNextSentence,
    "mlm+sop": MaskedWordsAndSentenceOrder,
    "span+sbo": MaskedSpans,
    "rtd": ReplacedTokens,
    "distill": Distillation,
    "causal": NextTokens,
    "span-corruption": SpanCorruption,
    "denoise": Denoising,
    "causal+memory": NextTokensWithMemory,
    "bilm": BothDirections,
}


def with_defaults(config: PretrainConfig, family: Family) -> PretrainConfig:
    """Return the settings with the defaults of the family and its objective filled in.

    Raises:
        RunError: there is no such objective, the family does not support it, or it cannot mask so or has other rows.
    """
    known = [name for name in family.objectives if name in OBJECTIVES]
    taught = isinstance(config, DistillConfig)
    if not known:
        raise RunError(f"{family.title} cannot be {'distilled' if taught else 'pretrained'} here: it has no objective.")
    name = config.objective or known[0]
    objective = OBJECTIVES[name] if name in known or taught else None
    if objective is None or (objective.learns or name) not in known:
        asked = f"bestiary distill needs {OBJECTIVES[name].learns}" if taught else f"--objective {name}"
        raise RunError(f"{asked}: {family.title} can learn {', '.join(known)}.")
    if config.rows is not None and objective.own_rows is not None:
        raise RunError(f"--rows {config.rows}: --objective {name} has rows of its own, {objective.own_rows}.")
    masking = config.masking or next(iter(objective.units), None)
    if masking is not None and masking not in objective.units:
        how = f"masks by {', '.join(objective.units)}" if objective.units else "masks nothing"
        raise RunError(f"--masking {masking}: --objective {name} {how}.")
    if config.mask_rate is not None and not objective.units:
        raise RunError(f"--mask-rate: --objective {name} masks nothing.")
    if config.memory is not None and name != "causal+memory":
        raise RunError(f"--memory: it is for --objective causal+memory, found {name}.")
    if not config.across_documents and name not in ("causal", "causal+memory"):
        raise RunError(f"--no-across-documents: it is for --objective causal; for {name}, see --rows.")
    for flag in ("generator_size", "generator"):
        if getattr(config, flag) is not None and name != "rtd":
            raise RunError(f"--{flag.replace('_', '-')}: --objective {name} has no generator; rtd has one.")
    restores = family.architectures[0].head == "generation"
    if config.z_loss and not restores:
        raise RunError(f"--z-loss: it is for the objectives of encoder-decoders, not for {name}.")
    if config.shared_dropout and "shared_dropout" not in {field.name for field in dataclasses.fields(family.config)}:
        raise RunError(f"--shared-dropout: {family.title} has no such dropout; T5 has it.")
    return dataclasses.replace(
        config,
        objective=name,
        rows=config.rows or (family.rows if objective.own_rows is None else None),
        masking=masking,
        mask_rate=family.mask_rate if config.mask_rate is None and objective.units else config.mask_rate,
    )


def make_objective(config: PretrainConfig, tokenizer: Tokenizer) -> Objective:
    """Return the objective of settings completed by `with_defaults`."""
    assert config.objective is not None
    return OBJECTIVES[config.objective].create(config, tokenizer)
