"""The interface of a model family: one value of type `Family`, which all code outside the family's file uses.

`registry` finds it by the name in a config.json, by a config, or by a model.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn.initializers import Initializer

from ..data.tokenizers.kinds import Kind
from .checkpoints.config import ConfigError, Extra, check_fields, read_fields, read_labels, write_fields, write_labels
from .checkpoints.tables import Table
from .layers.activations import ACTIVATIONS
from .layers.stack import LayerKind

Path = tuple[str, ...]  # of a parameter in its tree


@dataclass(frozen=True, kw_only=True)
class FamilyConfig:
    """Base of all families' configs. The defaults are those of the reference implementation."""

    MODEL_TYPE: ClassVar[str]
    """the family's name, and `model_type` in config.json"""
    STORED_TYPE: ClassVar[str] = ""
    """`model_type` in config.json, if it is another family's, whose checkpoints these are with heads of their own"""
    KEYS: ClassVar[Mapping[str, str]]
    """field -> key in config.json"""
    REQUIRED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"quantization_config": (None,)}
    """key in config.json -> the implemented values; any other is refused"""
    WRITTEN_ANEW: ClassVar[tuple[str, ...]] = ("model_type", "architectures")
    """keys that are written from the model, whatever the file had"""
    DTYPES: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    """data types that the model computes in"""
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
    repeated: tuple[tuple[str, str], ...] = ()
    """tied copies and buffers of the checkpoint, written back on saving; see `Table.kept`"""
    unprefixed: bool = False
    """whether the checkpoint's names lack the prefix of models with heads, as do those of released GPT-2s"""

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"{type(self).__name__}: dtype must be float32 or bfloat16, not {self.dtype!r}")
        check_fields(self, self.KEYS)

    @property
    def max_length(self) -> int | None:
        """Maximum length of an example, in tokens; None if there is no limit."""
        return None

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """Return a released size, with changes to its fields: `BertConfig.preset("bert-mini", vocab_size=16_384)`."""
        if name not in cls.PRESETS:
            raise ValueError(f"no preset {name!r} of {cls.MODEL_TYPE}; known: {', '.join(cls.PRESETS)}")
        return cls(**{**cls.PRESETS[name], **changes})

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], **more: Any) -> Self:
        """Make a config from a parsed config.json.

        Args:
            stored: the parsed file.
            more: fields that the family reads itself.

        Raises:
            ConfigError: settings are not implemented or inconsistent; all of them are listed.
        """
        required = {"model_type": (cls.STORED_TYPE or cls.MODEL_TYPE,), **cls.REQUIRED}
        fields, extra = read_fields(cls, stored, cls.KEYS, required)
        kept = tuple((key, text) for key, text in extra if key not in cls.WRITTEN_ANEW)
        try:
            return cls(**fields, **more, extra=kept)
        except ValueError as error:
            raise ConfigError(f"config.json:\n  {error}") from None

    def to_json(self) -> dict[str, Any]:
        """Return the dictionary to write as config.json, without `architectures`, which depends on the model."""
        return write_fields(self, self.KEYS) | {"model_type": self.STORED_TYPE or self.MODEL_TYPE}


@dataclass(frozen=True)
class StackConfig(FamilyConfig):
    """Base of the configs of models that are one stack of layers, of whatever inputs. The keys are those of BERT."""

    KEYS: ClassVar[Mapping[str, str]] = {
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "feed_forward": "intermediate_size",
        "activation": "hidden_act",
        "dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
        "norm_epsilon": "layer_norm_eps",
        "initializer_range": "initializer_range",
        "problem_type": "problem_type",
    }
    REQUIRED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_act": tuple(ACTIVATIONS),
        "activation": tuple(ACTIVATIONS),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "is_encoder_decoder": (False,),
        "pruned_heads": ({}, None),
        "quantization_config": (None,),
        "problem_type": (None, "regression", "single_label_classification", "multi_label_classification"),
    }
    WRITTEN_ANEW: ClassVar[tuple[str, ...]] = ("model_type", "architectures", "id2label", "label2id", "num_labels")

    width: int = 768
    """size of the hidden states, E"""
    layers: int = 12
    """number of layers, N"""
    heads: int = 12
    """number of attention heads, H; must divide the width"""
    feed_forward: int = 3072
    """inner width of the feed-forward sub-layer, F"""
    activation: str = "gelu"
    """activation function, a name in layers.ACTIVATIONS"""
    dropout: float = 0.1
    """dropout rate of hidden states"""
    attention_dropout: float = 0.1
    """dropout rate of attention probabilities"""
    norm_epsilon: float = 1e-12
    """epsilon of layer normalisation, added to the variance"""
    initializer_range: float = 0.02
    """standard deviation of new weights (normal distribution, truncated at two standard deviations)"""
    problem_type: str | None = None
    """type of a classifier of examples: regression, single_label_classification or multi_label_classification"""
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
    def kinds(self) -> tuple[LayerKind, ...] | None:
        """Each layer's own arguments, see `run_layers`; None if all layers are alike."""
        return None

    @property
    def sets(self) -> tuple[int, ...] | None:
        """Number of the set of parameters that each layer uses, from 0; None if each layer has its own."""
        return None

    @property
    def initializer(self) -> Initializer:
        """Initialiser of new kernels and embeddings."""
        return nn.initializers.truncated_normal(self.initializer_range)

    @property
    def head_initializer(self) -> Initializer:
        """Initialiser of the kernel of a head's last linear map."""
        return self.initializer

    @property
    def pooling(self) -> str:
        """What heads over whole examples read: "cls" and "last", the first and last token, or "mean" over all."""
        return "cls"

    def head_dropout(self, head: str) -> float:
        """Return the dropout rate of the inputs of a head's last linear map."""
        return 0.0 if head == "span" else self.dropout

    def dropout_fields(self, rate: float) -> dict[str, float]:
        """Return the fields to change for this dropout rate throughout the encoder."""
        return {"dropout": rate, "attention_dropout": rate}

    @property
    def size_in_words(self) -> str:
        """Number of layers, to display."""
        return f"{self.layers} layers"

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], **more: Any) -> Self:
        """See `FamilyConfig.from_json`."""
        count, names = read_labels(stored)
        return super().from_json(stored, num_labels=count, label_names=names, **more)

    def to_json(self) -> dict[str, Any]:
        """See `FamilyConfig.to_json`."""
        stored = super().to_json() | write_labels(self.num_labels, self.label_names)
        if self.problem_type is None:
            del stored["problem_type"]
        return stored


@dataclass(frozen=True)
class EncoderConfig(StackConfig):
    """Base of the configs of encoders of tokens. The keys are those of BERT and most of its successors."""

    KEYS: ClassVar[Mapping[str, str]] = {
        **StackConfig.KEYS,
        "vocab_size": "vocab_size",
        "positions": "max_position_embeddings",
        "token_types": "type_vocab_size",
        "classifier_dropout": "classifier_dropout",
        "pad_token_id": "pad_token_id",
    }
    REQUIRED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **StackConfig.REQUIRED,
        "position_embedding_type": ("absolute",),
        "tie_word_embeddings": (True,),
    }

    vocab_size: int = 30_522
    """number of tokens, V"""
    positions: int = 512
    """number of position embeddings"""
    token_types: int = 0
    """number of token types (sentence A, B); with fewer than two, the model takes no `token_type_ids`"""
    classifier_dropout: float | None = None
    """dropout rate of a classifier's inputs; None: `dropout`"""
    pad_token_id: int | None = 0
    """token whose embedding gets no gradient from lookups; None: none"""

    @property
    def max_length(self) -> int | None:
        """Maximum length of an example, in tokens."""
        return self.positions

    @property
    def table_width(self) -> int:
        """Size of the vectors of words, positions and token types."""
        return self.width

    def head_dropout(self, head: str) -> float:
        """See `StackConfig.head_dropout`."""
        if head == "span" or self.classifier_dropout is None:
            return super().head_dropout(head)
        return self.classifier_dropout

    @classmethod
    def vocabulary_fields(cls, size: int, ids: Mapping[str, int]) -> dict[str, Any]:
        """Return the fields of a new model that its tokenizer decides.

        Args:
            size: number of tokens.
            ids: ids of special tokens by role, such as "pad" and "eos", as far as there are such.
        """
        return {"vocab_size": size, "pad_token_id": ids.get("pad", 0)}


class Architecture(NamedTuple):
    """One kind of model of a family."""

    name: str  # in config.json's `architectures`
    head: str  # the head's name in this package, such as "classification"
    build: Callable[[Any], nn.Module]  # config -> the model
    table: Callable[[Any], Table]  # config -> the names of its parameters in checkpoints


def token_ids(config: FamilyConfig) -> tuple[Any, ...]:
    """Return the input shapes of a model that reads tokens: [1, 1] int32."""
    del config
    return (jax.ShapeDtypeStruct((1, 1), jnp.int32),)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models. A family's file ends with its value, `FAMILY`."""

    config: type[FamilyConfig]
    title: str
    """name to display"""
    paper: str
    architectures: tuple[Architecture, ...]
    """in the order to try for a checkpoint that names none of them; `bestiary models` counts the first"""
    tokenizers: tuple[Kind, ...] = ()
    """kinds of tokenizers of the released checkpoints; pretraining trains the first"""
    tokenizer_like: str | None = None
    """model family in `data.tokenizers.kinds.FAMILIES` whose special tokens a newly trained tokenizer has; None: the
    kind's first"""
    objectives: tuple[str, ...] = ()
    """pretraining objectives, the default first"""
    rows: Literal["sentences", "full-sentences", "doc-sentences"] = "sentences"
    """rows of running text that its paper pretrains on, where an objective leaves a choice"""
    masks: Literal["counted", "independent"] = "counted"
    """how its paper draws the tokens to mask: a fixed number per row, or each independently of the others"""
    mask_rate: float = 0.15
    """fraction of the tokens to predict in pretraining"""
    evaluation_mask_rate: float | None = None
    """the same in evaluation, for masked words; None: that of the training"""
    reads: Literal["text", "images", "images and text"] = "text"
    """what its models take; those of images have no tokenizers"""
    members: tuple[tuple[str, str], ...] = ()
    """(field of the config, key in config.json) of each `Member`, for a model that contains models of other families"""
    example: Callable[[Any], tuple[Any, ...]] = token_ids
    """config -> shapes and dtypes of inputs for initialising a model"""
    below: tuple[str, ...] = ("embeddings",)
    """parts of an encoder before its layers"""
    above: tuple[str, ...] = ()
    """parts of an encoder after its layers that all of its models have"""
    delimited: bool = False
    """whether its paper fine-tunes with new tokens before, between and after texts"""
    like: tuple[str, ...] = ()
    """other families whose layers and embeddings a model of this one may start from, in distillation"""
    settled: Callable[[Any, Collection[str]], Any] | None = None
    """(config of a config.json, names of the checkpoint's tensors) -> the config, where only these tell; None: the
    config as it is"""
    one_kind: bool = False
    """whether the family has a single kind of model, all of whose parameters are in every checkpoint"""

    @property
    def name(self) -> str:
        """`model_type` in config.json."""
        return self.config.MODEL_TYPE

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the heads, without repetition."""
        return tuple(dict.fromkeys(architecture.head for architecture in self.architectures))

    def build(self, head: str, config: FamilyConfig) -> Any:
        """Build a model with `head`.

        Raises:
            ValueError: the family has no such head.
        """
        for architecture in self.architectures:
            if architecture.head == head:
                return architecture.build(config)
        raise ValueError(f"{self.title} has no head {head!r}; known: {', '.join(self.heads)}")

    def architecture_of(self, model: nn.Module) -> Architecture:
        """Return the architecture of a model.

        Raises:
            TypeError: it is not a model of this family.
        """
        plain: Any = model.clone(name=None, parent=None)
        for architecture in self.architectures:
            if architecture.build(plain.config) == plain:
                return architecture
        raise TypeError(f"{type(model).__name__} is not a model of {self.title}")

    def checkpoint_table(self, model: nn.Module) -> Table:
        """Return the table of a model's parameters and their names in checkpoints."""
        return self.architecture_of(model).table(model.config)  # type: ignore[attr-defined]

    def inputs(self, config: FamilyConfig) -> tuple[Array, ...]:
        """Return zero inputs for initialising a model: `model.init(key, *family.inputs(config))`."""
        return tuple(jnp.zeros(like.shape, like.dtype) for like in self.example(config))

    def is_encoder_parameter(self, path: Path) -> bool:
        """Tell whether all models of the family have this parameter.

        The others, those of poolers and heads, may be newly initialised, and are trained fully alongside adapters.
        """
        return self.one_kind or _in_encoder(path) in (*self.below, "layers", *self.above)

    def depths(self, model: nn.Module) -> dict[Path, np.ndarray]:
        """Return the depth of each of a model's modules, by path, for freezing and layer-wise learning rates.

        0 is below the layers, i is layer i of N (from 1), N + 1 is above them (poolers and heads). The depth is an
        array [n] int for n layers with stacked parameters, [] int for a single module. A set of parameters that several
        layers share counts as the last of them.
        """
        config: Any = model.config  # type: ignore[attr-defined]
        count: int = config.layers
        last = {} if config.sets is None else {number: layer for layer, number in enumerate(config.sets)}
        found: dict[Path, np.ndarray] = {}
        for entry in self.checkpoint_table(model).entries:
            if entry.numbers is not None:
                depth = np.array([last.get(number, number) for number in entry.numbers]) + 1
            elif _in_encoder(entry.path) in self.below:
                depth = np.array(0)
            else:
                depth = np.array(count if self.is_encoder_parameter(entry.path) else count + 1)
            found[entry.path[:-1]] = depth
        return found


class Member(NamedTuple):
    """A model of one family inside a model of another."""

    family: Family
    config: Any


def _in_encoder(path: Path) -> str:
    """Return the part of an encoder that contains a parameter; in models with heads, the encoder is named `encoder`."""
    return path[path.index("encoder") + 1] if "encoder" in path else path[0]
