"""The model families, and functions to find one by its name, by a config, or by a model."""

from collections.abc import Collection, Iterator
from importlib import import_module
from typing import Any

import flax.linen as nn
import jax

from .family import Architecture, Family, FamilyConfig

# Name of a family -> its module, imported on first use, and the family's name in it, if that is not FAMILY. The name is
# `model_type` of config.json, except for those of VARIANTS.
FAMILIES = {
    "albert": ".encoders.albert",
    "bart": ".encoder_decoders.bart",
    "bert": ".encoders.bert",
    "bilstm": ".recurrent.bilstm",
    "conv-vit": ".images.conv_vit",
    "distilbert": ".encoders.distilbert",
    "electra": ".encoders.electra",
    "elmo": ".recurrent.elmo",
    "gpt2": ".decoders.gpt2",
    "gpt3": ".decoders.gpt2:GPT3",
    "gpt_neo": ".decoders.gptneo",
    "marian": ".encoder_decoders.marian",
    "modernbert": ".encoders.modernbert",
    "mt5": ".encoder_decoders.t5:MT5",
    "openai-gpt": ".decoders.gpt1",
    "plain-vit": ".images.plain_vit",
    "recurrent": ".recurrent.seq2seq",
    "roberta": ".encoders.roberta",
    "spanbert": ".encoders.spanbert",
    "t5": ".encoder_decoders.t5",
    "transfo-xl": ".decoders.transformer_xl",
    "transformer": ".encoder_decoders.transformer",
    "unit": ".multimodal.unit",
    "vit": ".images.vit",
    "xlm-roberta": ".encoders.roberta:XLM",
}

# `model_type` of config.json -> the families whose checkpoints are that family's, with heads of their own.
VARIANTS = {"bert": ("spanbert",)}


def family_named(name: str) -> Family:
    """Return the family of this name, one of `FAMILIES`."""
    module, _, value = FAMILIES[name].partition(":")
    return getattr(import_module(module, __package__), value or "FAMILY")


def stored_family(model_type: str, architectures: Collection[str]) -> Family:
    """Return the family of a config.json, by its `model_type` and the names of its `architectures`."""
    family = family_named(model_type)
    known = {architecture.name for architecture in family.architectures}
    for variant in map(family_named, VARIANTS.get(model_type, ())):
        own = {architecture.name for architecture in variant.architectures} - known
        if own.intersection(architectures):
            return variant
    return family


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
