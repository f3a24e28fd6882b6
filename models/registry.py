"""The families there are, and how one is found: by its name, by a config, or by a model."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import flax.linen as nn
import jax

from .family import Architecture, Family, FamilyConfig

# `model_type` of config.json -> the module that holds the family, imported when it is asked for.
FAMILIES = {
    "bert": ".bert",
    "distilbert": ".distilbert",
    "marian": ".marian",
    "roberta": ".roberta",
    "transformer": ".transformer",
}


def family_named(name: str) -> Family:
    """The family of a `model_type`, one of `FAMILIES`."""
    return import_module(FAMILIES[name], __package__).FAMILY


def families() -> Iterator[Family]:
    """All families."""
    return map(family_named, FAMILIES)


def family_of(config: FamilyConfig) -> Family:
    """The family of a config."""
    return family_named(config.MODEL_TYPE)


def family_of_model(model: nn.Module) -> tuple[Family, Architecture]:
    """A model's family, and which of its kinds the model is.

    Raises:
        TypeError: no model of these families.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, FamilyConfig):
        raise TypeError(
            f"{type(model).__name__} is not a model of a family of this version; known: {', '.join(FAMILIES)}"
        )
    family = family_of(config)
    return family, family.architecture_of(model)


def presets() -> dict[str, Family]:
    """Name of each released size -> its family."""
    return {name: family for family in families() for name in family.config.PRESETS}


def init_params(model: Any, key: jax.Array) -> Any:
    """New parameters of a model, in boxes of logical axis names, from the inputs that its family takes."""
    return model.init(key, *family_of(model.config).inputs(model.config))["params"]
