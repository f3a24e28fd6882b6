"""The model families, and functions to find one by its name, by a config, or by a model."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import flax.linen as nn
import jax

from .family import Architecture, Family, FamilyConfig

# `model_type` of config.json -> the family's module, imported on first use.
FAMILIES = {
    "bert": ".bert",
    "distilbert": ".distilbert",
    "marian": ".marian",
    "roberta": ".roberta",
    "transformer": ".transformer",
}


def family_named(name: str) -> Family:
    """Return the family of a `model_type`, one of `FAMILIES`."""
    return import_module(FAMILIES[name], __package__).FAMILY


def families() -> Iterator[Family]:
    """Yield all families."""
    return map(family_named, FAMILIES)


def family_of(config: FamilyConfig) -> Family:
    """Return the family of a config."""
    return family_named(config.MODEL_TYPE)


def family_of_model(model: nn.Module) -> tuple[Family, Architecture]:
    """Return a model's family and architecture.

    Raises:
        TypeError: it is not a model of these families.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, FamilyConfig):
        raise TypeError(
            f"{type(model).__name__} is not a model of a family of this version; known: {', '.join(FAMILIES)}"
        )
    family = family_of(config)
    return family, family.architecture_of(model)


def presets() -> dict[str, Family]:
    """Return the released sizes: name -> family."""
    return {name: family for family in families() for name in family.config.PRESETS}


def init_params(model: Any, key: jax.Array) -> Any:
    """Initialise a model's parameters, boxed with their logical axis names, using its family's example inputs."""
    return model.init(key, *family_of(model.config).inputs(model.config))["params"]
