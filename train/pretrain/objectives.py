"""The pretraining objectives there are."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

from ...data import Tokenizer
from ...models.family import Family
from ..errors import RunError
from .config import PretrainConfig, RowKind
from .mlm import MaskedWords
from .mlm_nsp import MaskedWordsAndNextSentence
from .objective import Objective


class ObjectiveClass(Protocol):
    """What an objective's class offers."""

    def create(self, config: PretrainConfig, tokenizer: Tokenizer) -> Objective:
        """The objective with a run's settings; RunError for one that does not go with it."""
        ...

    def default_rows(self, family: Family) -> RowKind | None:
        """The rows that a family learns it from, where the objective leaves a choice."""
        ...


OBJECTIVES: Mapping[str, ObjectiveClass] = {
    "mlm": MaskedWords,
    "mlm+nsp": MaskedWordsAndNextSentence,
}


def with_defaults(config: PretrainConfig, family: Family) -> PretrainConfig:
    """The same settings, with the family's own objective and rows where none are asked for.

    Raises:
        RunError: there is no such objective, or the family cannot learn it.
    """
    known = [name for name in family.objectives if name in OBJECTIVES]
    if not known:
        raise RunError(f"{family.title} cannot be pretrained here: it has no objective.")
    name = config.objective or known[0]
    if name not in known:
        raise RunError(f"--objective {name}: {family.title} can learn {', '.join(known)}.")
    rows = OBJECTIVES[name].default_rows(family) if config.rows is None else config.rows
    return dataclasses.replace(config, objective=name, rows=rows)


def make_objective(config: PretrainConfig, tokenizer: Tokenizer) -> Objective:
    """The objective of settings that `with_defaults` has completed."""
    assert config.objective is not None
    return OBJECTIVES[config.objective].create(config, tokenizer)
