"""What a family of models offers: one value of the type `Family`, which everything outside of the family's file asks.

`registry` finds it by the name in a config.json, by a config, or by a model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn.initializers import Initializer

from .checkpoints.config import ConfigError, Extra, read_fields, read_labels, write_fields, write_labels
from .checkpoints.tables import Table
from .layers import ACTIVATIONS

Path = tuple[str, ...]  # names on the way to a parameter


@dataclass(frozen=True)
class FamilyConfig:
    """What the configs of all families have in common. Their defaults are those of the reference implementation."""

    MODEL_TYPE: ClassVar[str]
    """`model_type` in config.json, the family's name"""
    KEYS: ClassVar[Mapping[str, str]]
    """field -> key in config.json"""
    REQUIRED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"quantization_config": (None,)}
    """key in config.json -> the values that are implemented; any other is refused"""
    WRITTEN_ANEW: ClassVar[tuple[str, ...]] = ("model_type", "architectures")
    """keys that `to_json` or the model writes, whatever the file had"""
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """name of a released size -> its fields"""

    dtype: str = "float32"
    """data type of the computation, float32 or bfloat16; parameters, norms, softmax and losses stay float32"""
    scan_layers: bool = True
    """compile one layer and loop over it; off unrolls the layers (same results, longer compilation)"""
    remat: bool = False
    """recompute each layer in the backward pass: less memory, about a third more computation"""
    attention_implementation: str | None = None
    """backend of kernels.attention; None: the fastest"""

    extra: Extra = ()
    """other entries of config.json, written back on saving"""
    repeated: tuple[str, ...] = ()
    """tied copies and buffers of the checkpoint, written back on saving"""

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"{type(self).__name__}: dtype is one of float32, bfloat16, not {self.dtype!r}")

    @property
    def max_length(self) -> int | None:
        """Tokens of the longest example; None where there is no limit."""
        return None

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """A released size, with changes to its fields: `BertConfig.preset("bert-mini", vocab_size=16_384)`."""
        if name not in cls.PRESETS:
            raise ValueError(f"no preset {name!r} of {cls.MODEL_TYPE}; known: {', '.join(cls.PRESETS)}")
        return cls(**{**cls.PRESETS[name], **changes})

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], **more: Any) -> Self:
        """The config of a parsed config.json.

        Args:
            stored: the parsed file.
            more: fields that a family reads in a way of its own.

        Raises:
            ConfigError: settings that are not implemented or do not fit together; all of them are named.
        """
        fields, extra = read_fields(cls, stored, cls.KEYS, {"model_type": (cls.MODEL_TYPE,), **cls.REQUIRED})
        kept = tuple((key, text) for key, text in extra if key not in cls.WRITTEN_ANEW)
        try:
            return cls(**fields, **more, extra=kept)
        except ValueError as error:
            raise ConfigError(f"config.json:\n  {error}") from None

    def to_json(self) -> dict[str, Any]:
        """The dictionary to write as config.json, without `architectures`, which are the model's to say."""
        return write_fields(self, self.KEYS) | {"model_type": self.MODEL_TYPE}


@dataclass(frozen=True)
class EncoderConfig(FamilyConfig):
    """What the configs of encoders have in common. The keys are those that BERT and most after it have."""

    KEYS: ClassVar[Mapping[str, str]] = {
        "vocab_size": "vocab_size",
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "feed_forward": "intermediate_size",
        "positions": "max_position_embeddings",
        "token_types": "type_vocab_size",
        "activation": "hidden_act",
        "dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
        "classifier_dropout": "classifier_dropout",
        "norm_epsilon": "layer_norm_eps",
        "initializer_range": "initializer_range",
        "pad_token_id": "pad_token_id",
        "problem_type": "problem_type",
    }
    REQUIRED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_act": tuple(ACTIVATIONS),
        "activation": tuple(ACTIVATIONS),
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "is_encoder_decoder": (False,),
        "tie_word_embeddings": (True,),
        "pruned_heads": ({}, None),
        "quantization_config": (None,),
        "problem_type": (None, "regression", "single_label_classification", "multi_label_classification"),
    }
    WRITTEN_ANEW: ClassVar[tuple[str, ...]] = ("model_type", "architectures", "id2label", "label2id", "num_labels")

    vocab_size: int = 30_522
    """number of tokens, V"""
    width: int = 768
    """size of the hidden states, E"""
    layers: int = 12
    """number of layers, N"""
    heads: int = 12
    """number of attention heads, H; must divide the width"""
    feed_forward: int = 3072
    """inner width of the feed-forward sub-layer, F"""
    positions: int = 512
    """rows of the table of positions"""
    token_types: int = 0
    """number of sentence kinds (A, B); below two there is nothing to tell apart"""
    activation: str = "gelu"
    """activation function, a name in layers.ACTIVATIONS"""
    dropout: float = 0.1
    """dropout rate of hidden states"""
    attention_dropout: float = 0.1
    """dropout rate of attention probabilities"""
    classifier_dropout: float | None = None
    """dropout rate of a classifier's inputs; None: that of hidden states"""
    norm_epsilon: float = 1e-12
    """epsilon of layer normalisation, added to the variance"""
    initializer_range: float = 0.02
    """standard deviation of the normal distribution, truncated at two standard deviations, of new weights"""
    pad_token_id: int | None = 0
    """token whose embedding gets no gradient from lookups; None: none"""
    problem_type: str | None = None
    """what a sequence classifier predicts: regression, single_label_classification, multi_label_classification"""
    num_labels: int = 2
    """number of classes of a classifier"""
    label_names: tuple[str, ...] | None = None
    """names of the classes"""

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.width % self.heads:
            raise ValueError(f"{name}: width {self.width} is not a multiple of heads {self.heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"{name}: unknown activation {self.activation!r}; known: {', '.join(ACTIVATIONS)}")
        if self.label_names is not None and len(self.label_names) != self.num_labels:
            raise ValueError(f"{name}: {self.num_labels} labels, but {len(self.label_names)} label names")

    @property
    def max_length(self) -> int | None:
        """Tokens of the longest example."""
        return self.positions

    @property
    def initializer(self) -> Initializer:
        """What new kernels and embeddings are drawn by."""
        return nn.initializers.truncated_normal(self.initializer_range)

    def head_dropout(self, head: str) -> float:
        """Share of the inputs of a head's last linear map that is dropped in training."""
        if head == "span":
            return 0.0
        return self.dropout if self.classifier_dropout is None else self.classifier_dropout

    def dropout_fields(self, rate: float) -> dict[str, float]:
        """The fields to change for dropout of this rate all over the encoder."""
        return {"dropout": rate, "attention_dropout": rate}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], **more: Any) -> Self:
        """As `FamilyConfig.from_json`."""
        count, names = read_labels(stored)
        return super().from_json(stored, num_labels=count, label_names=names, **more)

    def to_json(self) -> dict[str, Any]:
        """As `FamilyConfig.to_json`."""
        stored = super().to_json() | write_labels(self.num_labels, self.label_names)
        if self.problem_type is None:
            del stored["problem_type"]
        return stored


class Architecture(NamedTuple):
    """One kind of model of a family."""

    name: str  # in config.json's `architectures`
    head: str  # what it is for, as callers name it
    build: Callable[[Any], nn.Module]  # config -> the model
    table: Callable[[Any], Table]  # config -> the names of its parameters in checkpoints


def token_ids(config: FamilyConfig) -> tuple[Any, ...]:
    """The inputs of a model that reads tokens: [1, 1] int32."""
    del config
    return (jax.ShapeDtypeStruct((1, 1), jnp.int32),)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models. A family's file ends with its value, `FAMILY`."""

    config: type[FamilyConfig]
    title: str
    """name for people"""
    paper: str
    tokenizer: str
    """kind of vocabulary that the released checkpoints have"""
    architectures: tuple[Architecture, ...]
    """in the order in which a checkpoint that names none of them is tried; `bestiary models` counts the first"""
    objectives: tuple[str, ...] = ()
    """what it can be pretrained by, the default first"""
    example: Callable[[Any], tuple[Any, ...]] = token_ids
    """config -> shapes and dtypes of inputs, to initialise a model with"""
    below: tuple[str, ...] = ("embeddings",)
    """parts of an encoder that come before its layers"""
    above: tuple[str, ...] = ()
    """parts of an encoder that come after its layers and that all of its models have"""
    one_kind: bool = False
    """whether there is one kind of model, all of whose parameters every checkpoint has"""

    @property
    def name(self) -> str:
        """`model_type` in config.json."""
        return self.config.MODEL_TYPE

    @property
    def heads(self) -> tuple[str, ...]:
        """What its models are for."""
        return tuple(dict.fromkeys(architecture.head for architecture in self.architectures))

    def build(self, head: str, config: FamilyConfig) -> Any:
        """A new model for `head`.

        Raises:
            ValueError: the family has no such head.
        """
        for architecture in self.architectures:
            if architecture.head == head:
                return architecture.build(config)
        raise ValueError(f"{self.title} has no head {head!r}; known: {', '.join(self.heads)}")

    def architecture_of(self, model: nn.Module) -> Architecture:
        """Which of the family's kinds a model is.

        Raises:
            TypeError: none of them.
        """
        plain: Any = model.clone(name=None, parent=None)
        for architecture in self.architectures:
            if architecture.build(plain.config) == plain:
                return architecture
        raise TypeError(f"{type(model).__name__} is not a model of {self.title}")

    def checkpoint_table(self, model: nn.Module) -> Table:
        """The names of a model's parameters in checkpoints."""
        return self.architecture_of(model).table(model.config)  # type: ignore[attr-defined]

    def inputs(self, config: FamilyConfig) -> tuple[Array, ...]:
        """Zeros to initialise a model with: `model.init(key, *family.inputs(config))`."""
        return tuple(jnp.zeros(like.shape, like.dtype) for like in self.example(config))

    def is_encoder_parameter(self, path: Path) -> bool:
        """Whether all models of the family have this parameter.

        The others, of poolers and heads, may be newly initialised, and are trained whole beside adapters.
        """
        return self.one_kind or _in_encoder(path) in (*self.below, "layers", *self.above)

    def depths(self, model: nn.Module) -> dict[Path, np.ndarray]:
        """How far up each of a model's modules stands, by its path: what freezing and layer-wise rates go by.

        0 is below the layers, i is layer i of N (from 1), N + 1 above them (poolers and heads). An array [n] int is of
        n layers whose parameters are stacked, one of no dimensions of a single module; a module that all layers share
        counts as the last layer.
        """
        count: int = model.config.layers  # type: ignore[attr-defined]
        found: dict[Path, np.ndarray] = {}
        for entry in self.checkpoint_table(model).entries:
            if entry.numbers is not None:
                depth = np.array(entry.numbers) + 1
            elif _in_encoder(entry.path) in self.below:
                depth = np.array(0)
            else:
                depth = np.array(count if self.is_encoder_parameter(entry.path) else count + 1)
            found[entry.path[:-1]] = depth
        return found


def _in_encoder(path: Path) -> str:
    """The part of an encoder that a parameter lies in; heads keep the encoder as `encoder`."""
    return path[1] if path[0] == "encoder" else path[0]
