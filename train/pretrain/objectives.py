"""The pretraining objectives, by name."""

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
    """Interface of an objective's class."""

    def create(self, config: PretrainConfig, tokenizer: Tokenizer) -> Objective:
        """Create the objective for a run's settings; raise RunError if they do not fit it."""
        ...

    def default_rows(self, family: Family) -> RowKind | None:
        """Return the default rows of a family, if the objective leaves a choice."""
        ...


OBJECTIVES: Mapping[str, ObjectiveClass] = {
    "mlm": MaskedWords,
    "mlm+nsp": MaskedWordsAndNextSentence,
}


def with_defaults(config: PretrainConfig, family: Family) -> PretrainConfig:
    """Return the settings with the family's default objective and rows filled in.

    Raises:
        RunError: there is no such objective, or the family does not support it.
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
    """Return the objective of settings completed by `with_defaults`."""
    assert config.objective is not None
    return OBJECTIVES[config.objective].create(config, tokenizer)
