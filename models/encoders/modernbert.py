"""ModernBERT: an encoder with what decoders have learnt since BERT, for long texts.

Warner et al. 2024, "Smarter, Better, Faster, Longer: A Modern Bidirectional Encoder for Fast, Memory Efficient, and
Long Context Finetuning and Inference"; the same network in smaller and larger sizes: Weller et al. 2025, "Seq vs Seq:
An Open Suite of Paired Encoders and Decoders" (Ettin).

What sets it apart from its neighbours: rotary positions instead of a table; every third layer attends to the whole
text, the others to a window around each token, with rotary frequencies of their own (2.1.2); layers normalised before
each part and once at the end, except that the first layer's attention reads the embeddings, which are normalised
already; GELU with a gate; no biases but the decoder's; no token types and no pooler. Its heads read [CLS] or the mean
over the tokens, through a dense layer, GELU and a norm.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import flax.linen as nn
from jax import Array
from jax.nn.initializers import Initializer

from ..checkpoints.config import ConfigError
from ..checkpoints.tables import Entry, fused_entries, linear_entries, norm_entries, same
from ..encoder import Encoder, check_length
from ..family import EncoderConfig, Family
from ..heads.with_head import EncoderParts, Form, architectures
from ..layers.activations import ACTIVATIONS
from ..layers.attention import Attention
from ..layers.dropout import Dropout
from ..layers.feed_forward import FeedForward
from ..layers.linear import Embed
from ..layers.norms import LayerNorm
from ..layers.segments import Rows, Segments
from ..layers.stack import LayerKind

GLOBAL, LOCAL = "full_attention", "sliding_attention"


def _size(layers: int, width: int, feed_forward: int, **more: Any) -> dict[str, Any]:
    """Return the fields of a size; all have heads of 64."""
    return {"layers": layers, "width": width, "heads": width // 64, "feed_forward": feed_forward, **more}


def _ettin(layers: int, width: int, feed_forward: int) -> dict[str, Any]:
    """Return the fields of a size of Ettin, whose windows have the frequencies of whole texts."""
    return _size(layers, width, feed_forward, local_theta=160_000.0, positions=7999)


@dataclass(frozen=True)
class ModernBertConfig(EncoderConfig):
    """Sizes and settings of a ModernBERT. The defaults are those of the base model."""

    MODEL_TYPE: ClassVar[str] = "modernbert"
    KEYS: ClassVar[Mapping[str, str]] = {
        "vocab_size": "vocab_size",
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "feed_forward": "intermediate_size",
        "positions": "max_position_embeddings",
        "activation": "hidden_activation",
        "dropout": "embedding_dropout",
        "attention_dropout": "attention_dropout",
        "feed_forward_dropout": "mlp_dropout",
        "classifier_dropout": "classifier_dropout",
        "classifier_pooling": "classifier_pooling",
        "norm_epsilon": "norm_eps",
        "initializer_range": "initializer_range",
        "pad_token_id": "pad_token_id",
        "problem_type": "problem_type",
        "local_attention": "local_attention",
        "global_every": "global_attn_every_n_layers",
        "global_theta": "global_rope_theta",
        "local_theta": "local_rope_theta",
    }
    REQUIRED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **EncoderConfig.REQUIRED,
        "hidden_activation": tuple(ACTIVATIONS),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "norm_bias": (False,),
        "classifier_bias": (False,),
        "classifier_activation": ("gelu",),
        "decoder_bias": (True,),
        "rope_scaling": (None,),
    }
    WRITTEN_ANEW: ClassVar[tuple[str, ...]] = (*EncoderConfig.WRITTEN_ANEW, "layer_types", "rope_parameters")
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Not released: to try things out. Windows of 8 learn from the nearest tokens within hundreds of steps.
        "modernbert-tiny": _size(4, 128, 192, local_attention=8),
        "modernbert-base": _size(22, 768, 1152),
        "modernbert-large": _size(28, 1024, 2624),
        "ettin-encoder-17m": _ettin(7, 256, 384),
        "ettin-encoder-32m": _ettin(10, 384, 576),
        "ettin-encoder-68m": _ettin(19, 512, 768),
        "ettin-encoder-150m": _ettin(22, 768, 1152),
        "ettin-encoder-400m": _ettin(28, 1024, 2624),
        "ettin-encoder-1b": _ettin(28, 1792, 3840),
    }

    vocab_size: int = 50_368
    layers: int = 22
    feed_forward: int = 1152
    positions: int = 8192
    """maximum length of an example, in tokens; there is no table of positions"""
    dropout: float = 0.0
    """dropout rate of the embeddings"""
    attention_dropout: float = 0.0
    """dropout rate of attention probabilities and of the output of attention"""
    feed_forward_dropout: float = 0.0
    """dropout rate of the inner activations of the feed-forward sub-layer"""
    classifier_dropout: float | None = 0.0
    """dropout rate of the inputs of all heads' last layers"""
    classifier_pooling: str = "cls"
    """what heads over whole examples read: "cls", the first token, or "mean", the mean over an example's tokens"""
    norm_epsilon: float = 1e-5
    pad_token_id: int | None = 50_283
    local_attention: int = 128
    """size of the window of local layers: half of it on each side of a token, inclusive"""
    global_every: int = 3
    """layer i attends to the whole text if this divides i (from 0), else to its window"""
    global_layers: tuple[int, ...] | None = None
    """numbers of the layers that attend to the whole text, from 0; None: every `global_every`-th"""
    global_theta: float = 160_000.0
    """base of the rotary frequencies of layers that attend to the whole text"""
    local_theta: float | None = 10_000.0
    """base of the rotary frequencies of local layers; None: as `global_theta`"""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if self.classifier_pooling not in ("cls", "mean"):
            problems.append(
                f'classifier_pooling: expected "cls" or "mean", found {json.dumps(self.classifier_pooling)}'
            )
        if self.global_every < 1:
            problems.append(f"global_attn_every_n_layers: expected at least 1, found {self.global_every}")
        if self.width // self.heads % 2:
            problems.append(f"rotary positions need heads of even size, found {self.width // self.heads}")
        if problems:
            raise ValueError("ModernBertConfig: " + "; ".join(problems))

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Window and frequencies of each layer, and whether it is the first."""
        side = self.local_attention // 2
        local = {"window": (side, side), "theta": self._theta_of_windows}
        whole = {"window": None, "theta": self.global_theta}
        numbers = range(0, self.layers, self.global_every) if self.global_layers is None else self.global_layers
        return tuple({**(whole if i in numbers else local), "first": i == 0} for i in range(self.layers))

    @property
    def _theta_of_windows(self) -> float:
        return self.global_theta if self.local_theta is None else self.local_theta

    @property
    def pooling(self) -> str:
        """What heads over whole examples read."""
        return self.classifier_pooling

    @property
    def out_initializer(self) -> Initializer:
        """Initialiser of the maps back to the hidden states, smaller in deeper models."""
        return nn.initializers.truncated_normal(self.initializer_range / math.sqrt(2 * self.layers))

    def head_dropout(self, head: str) -> float:
        """See `EncoderConfig.head_dropout`."""
        del head
        return 0.0 if self.classifier_dropout is None else self.classifier_dropout

    def dropout_fields(self, rate: float) -> dict[str, float]:
        """See `EncoderConfig.dropout_fields`."""
        return {**super().dropout_fields(rate), "feed_forward_dropout": rate}

    @property
    def layer_types(self) -> list[str]:
        """The layers, as newer files list them."""
        return [GLOBAL if kind["window"] is None else LOCAL for kind in self.kinds]

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], **more: Any) -> Self:
        """See `FamilyConfig.from_json`. Newer files list the layers, and have rotary settings by kind of layer."""
        stored = {**stored, **_thetas(stored.get("rope_parameters"))}
        config = super().from_json(stored, **more)
        types = stored.get("layer_types")
        if types is None or types == config.layer_types:
            return config
        if not isinstance(types, list) or len(types) != config.layers or any(t not in (GLOBAL, LOCAL) for t in types):
            raise ConfigError(
                f'config.json:\n  layer_types: expected "{GLOBAL}" or "{LOCAL}" for each of {config.layers} layers, '
                f"found {json.dumps(types)}"
            )
        whole = tuple(layer for layer, kind in enumerate(types) if kind == GLOBAL)
        return dataclasses.replace(config, global_layers=whole)

    def to_json(self) -> dict[str, Any]:
        """See `FamilyConfig.to_json`. Both forms of the layers and of the rotary settings are written."""
        thetas = {GLOBAL: self.global_theta, LOCAL: self._theta_of_windows}
        rotary = {kind: {"rope_theta": theta, "rope_type": "default"} for kind, theta in thetas.items()}
        return super().to_json() | {"layer_types": self.layer_types, "rope_parameters": rotary}


def _thetas(rotary: Any) -> dict[str, Any]:
    """Return the settings of `rope_parameters` under the names of older files."""
    names = {GLOBAL: "global_rope_theta", LOCAL: "local_rope_theta"}
    rotary = {} if rotary is None else rotary
    nested = isinstance(rotary, Mapping) and all(
        given is None or isinstance(given, Mapping) for given in rotary.values()
    )
    settings = {kind: {} if given is None else dict(given) for kind, given in rotary.items()} if nested else {}
    scaled = [given for given in settings.values() if given.pop("rope_type", "default") != "default"]
    others = [given for given in settings.values() if given.keys() - {"rope_theta"}]
    if not nested or scaled or others or settings.keys() - names.keys():
        raise ConfigError(
            f'config.json:\n  rope_parameters: only a rope_theta of rope_type "default" is implemented, for "{GLOBAL}" '
            f'and "{LOCAL}", found {json.dumps(rotary)}'
        )
    return {names[kind]: given["rope_theta"] for kind, given in settings.items() if "rope_theta" in given}


class Embeddings(nn.Module):
    """Word vectors, normalised."""

    config: ModernBertConfig

    def setup(self) -> None:
        c = self.config
        self.word = Embed(c.vocab_size, c.width, "vocab", c.initializer, c.dtype, c.pad_token_id)
        self.norm = LayerNorm(c.norm_epsilon, c.dtype, use_bias=False)
        self.drop = Dropout(c.dropout)

    def __call__(self, input_ids: Array, position_ids: Array | None, *, rows: Rows, deterministic: bool) -> Array:
        del position_ids
        check_length(self.config, input_ids.shape[1])
        return self.drop(self.norm(self.word(input_ids)), rows, deterministic=deterministic)


class Block(nn.Module):
    """One layer: attention, then feed-forward, each of normalised inputs and then added."""

    config: ModernBertConfig

    @nn.compact
    def __call__(
        self,
        hidden: Array,
        segment_ids: Segments,
        rows: Rows,
        position_ids: Array | None,
        *,
        window: tuple[int, int] | None,
        theta: float,
        first: bool,
        deterministic: bool,
    ) -> Array:
        """Transform hidden states [B, L, E] -> [B, L, E]; `first` if it is the first layer."""
        c = self.config
        attention = Attention(
            c.width,
            c.heads,
            c.attention_dropout,
            c.initializer,
            c.dtype,
            c.attention_implementation,
            use_bias=False,
            out_bias=False,
            window=window,
            rotary=theta,
            out_init=c.out_initializer,
            name="attention",
        )
        feed_forward = FeedForward(
            c.feed_forward,
            c.activation,
            c.initializer,
            c.dtype,
            c.feed_forward_dropout,
            gated=True,
            use_bias=False,
            out_init=c.out_initializer,
            name="feed_forward",
        )

        normed = LayerNorm(c.norm_epsilon, c.dtype, use_bias=False, name="attention_norm")(hidden)
        attended = attention(
            hidden if first else normed, segment_ids, rows, position_ids=position_ids, deterministic=deterministic
        )
        hidden = hidden + Dropout(c.attention_dropout)(attended, rows, deterministic=deterministic)
        normed = LayerNorm(c.norm_epsilon, c.dtype, use_bias=False, name="feed_forward_norm")(hidden)
        return hidden + feed_forward(normed, rows, deterministic=deterministic)


class ModernBert(Encoder):
    """The encoder."""

    config: ModernBertConfig  # pyright: ignore[reportIncompatibleVariableOverride] (modules are frozen)
    pooler: bool = False

    def setup(self) -> None:
        c = self.config
        self.embeddings = Embeddings(c)
        self.layers = Block(c)
        self.final_norm = LayerNorm(c.norm_epsilon, c.dtype, use_bias=False)

    def leave(self, hidden: Array) -> Array:
        """Compute the encoder's output from the last layer's."""
        return self.final_norm(hidden)

    def layer_inputs(self, position_ids: Array | None) -> tuple[Any, ...]:
        """Return what every layer gets in addition to the hidden states, the segments and the row numbers."""
        return (position_ids,)


def encoder_entries(c: ModernBertConfig, prefix: str, path: tuple[str, ...], *, pooler: bool) -> list[Entry]:
    """Return the encoder's entries, with stored names under `prefix` and parameters at `path`; there is no pooler."""
    del pooler
    n, width, heads, inner = c.layers, (c.width,), (c.heads, c.width // c.heads), (c.feed_forward,)
    layer, at = f"{prefix}layers.{{layer}}.", (*path, "layers")
    parts = [(*at, "attention", part) for part in ("query", "key", "value")]
    gated = [(*at, "feed_forward", part) for part in ("gate", "inner")]
    words = same(c.vocab_size, c.width)
    return [
        Entry(f"{prefix}embeddings.tok_embeddings.weight", (*path, "embeddings", "word", "embedding"), words),
        *norm_entries(f"{prefix}embeddings.norm", (*path, "embeddings", "norm"), c.width, bias=False),
        *norm_entries(f"{layer}attn_norm", (*at, "attention_norm"), c.width, n, bias=False, absent=(0,)),
        *fused_entries(f"{layer}attn.Wqkv", parts, width, heads, n, bias=False),
        *linear_entries(f"{layer}attn.Wo", (*at, "attention", "out"), heads, width, n, bias=False),
        *norm_entries(f"{layer}mlp_norm", (*at, "feed_forward_norm"), c.width, n, bias=False),
        *fused_entries(f"{layer}mlp.Wi", gated, width, inner, n, bias=False),
        *linear_entries(f"{layer}mlp.Wo", (*at, "feed_forward", "outer"), inner, width, n, bias=False),
        *norm_entries(f"{prefix}final_norm", (*path, "final_norm"), c.width, bias=False),
    ]


PARTS = EncoderParts(ModernBert, encoder_entries, prefix="model.", classes="ModernBert", pooler=False)
HEAD = Form(transform="gelu", norm=True, bias=False, names=("head.dense", "head.norm", "classifier"))
FORMS = {
    "masked_lm": HEAD._replace(names=("head.dense", "head.norm", "decoder.bias", "decoder")),
    "classification": HEAD,
    "tokens": HEAD,
    "span": HEAD,
    "choice": HEAD,
}
FAMILY = Family(
    config=ModernBertConfig,
    title="ModernBERT",
    paper="Warner et al. 2024",
    tokenizers=("byte-bpe",),
    architectures=architectures(PARTS, FORMS),
    objectives=("mlm",),
    masks="independent",
    mask_rate=0.3,
    evaluation_mask_rate=0.15,
    above=("final_norm",),
)
