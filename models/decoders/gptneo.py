"""GPT-Neo: the replication of GPT-3 whose checkpoints were released.

Black et al. 2021, "GPT-Neo: Large Scale Autoregressive Language Modeling with Mesh-Tensorflow".

What sets it apart from GPT-2: every second layer attends to the last 256 tokens only, the attention scores are not
scaled, and the projections of queries, keys and values have no bias. Linear maps are stored [outputs, inputs].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, Self

import flax.linen as nn
import numpy as np
from jax import Array

from ...data.json_files import in_words
from ..checkpoints.config import ConfigError
from ..checkpoints.tables import Entry, linear_entries, norm_entries, same
from ..decoder import DecoderConfig, Embeddings, causal_masks
from ..encoder import Encoder
from ..family import Family
from ..heads.with_head import EncoderParts, Form, architectures
from ..layers.activations import ACTIVATIONS
from ..layers.attention import Attention
from ..layers.dropout import Dropout
from ..layers.feed_forward import FeedForward
from ..layers.norms import LayerNorm
from ..layers.segments import Rows, Segments
from ..layers.stack import LayerKind

GLOBAL, LOCAL = "global", "local"


def _size(layers: int, width: int, heads: int) -> dict[str, Any]:
    """Return the fields of a released size."""
    return {"layers": layers, "width": width, "heads": heads, "feed_forward": 4 * width}


@dataclass(frozen=True)
class GPTNeoConfig(DecoderConfig):
    """Sizes and settings of a GPT-Neo. The defaults are those of the model of 1.3 billion parameters."""

    MODEL_TYPE: ClassVar[str] = "gpt_neo"
    KEYS: ClassVar[Mapping[str, str]] = {
        "vocab_size": "vocab_size",
        "width": "hidden_size",
        "layers": "num_layers",
        "heads": "num_heads",
        "feed_forward": "intermediate_size",
        "positions": "max_position_embeddings",
        "window_size": "window_size",
        "activation": "activation_function",
        "dropout": "resid_dropout",
        "embedding_dropout": "embed_dropout",
        "attention_dropout": "attention_dropout",
        "classifier_dropout": "classifier_dropout",
        "norm_epsilon": "layer_norm_epsilon",
        "initializer_range": "initializer_range",
        "pad_token_id": "pad_token_id",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "problem_type": "problem_type",
    }
    REQUIRED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **DecoderConfig.REQUIRED,
        "activation_function": tuple(ACTIVATIONS),
    }
    WRITTEN_ANEW: ClassVar[tuple[str, ...]] = (*DecoderConfig.WRITTEN_ANEW, "attention_types", "attention_layers")
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "gpt-neo-125m": _size(12, 768, 12),
        "gpt-neo-1.3b": _size(24, 2048, 16),
        "gpt-neo-2.7b": _size(32, 2560, 20),
    }

    width: int = 2048
    layers: int = 24
    heads: int = 16
    feed_forward: int = 8192
    positions: int = 2048
    dropout: float = 0.0
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float | None = 0.1
    bos_token_id: int | None = 50_256
    eos_token_id: int | None = 50_256
    window_size: int = 256
    """number of tokens that a token of a local layer attends to, its own included"""
    layer_types: tuple[str, ...] | None = None
    """"global" or "local" for each layer; None: in turn, global first"""

    def __post_init__(self) -> None:
        super().__post_init__()
        types = self.types
        if len(types) != self.layers or not set(types) <= {GLOBAL, LOCAL}:
            raise ValueError(
                f'GPTNeoConfig: attention_types: expected "{GLOBAL}" or "{LOCAL}" for each of {self.layers} layers, '
                f"found {len(types)}: {', '.join(map(str, types))}"
            )

    @property
    def types(self) -> tuple[str, ...]:
        """What each layer attends to, "global" or "local"."""
        return (
            tuple((GLOBAL, LOCAL)[i % 2] for i in range(self.layers)) if self.layer_types is None else self.layer_types
        )

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Window of each layer."""
        return tuple({"window": (self.window_size - 1, 0) if kind == LOCAL else None} for kind in self.types)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], **more: Any) -> Self:
        """See `FamilyConfig.from_json`. An inner width of null is four times the width."""
        width = stored.get("hidden_size", cls.width)
        if stored.get("intermediate_size") is None and isinstance(width, int):
            stored = {**stored, "intermediate_size": 4 * width}
        types = None if "attention_types" not in stored else _layer_types(stored["attention_types"])
        in_turn = types == tuple((GLOBAL, LOCAL)[i % 2] for i in range(len(types or ())))
        layers = stored.get("num_layers", cls.layers)
        types = None if in_turn and types is not None and len(types) == layers else types
        return super().from_json(stored, layer_types=types, **more)

    def to_json(self) -> dict[str, Any]:
        """See `FamilyConfig.to_json`."""
        inner = None if self.feed_forward == 4 * self.width else self.feed_forward
        repeated = self.types == (GLOBAL, LOCAL) * (self.layers // 2)
        types = [[[GLOBAL, LOCAL], self.layers // 2]] if repeated else [[list(self.types), 1]]
        return super().to_json() | {
            "intermediate_size": inner,
            "attention_types": types,
            "attention_layers": list(self.types),
        }


def _layer_types(stated: Any) -> tuple[str, ...]:
    """Return the kind of each layer, from [[kinds], how often] of `attention_types`.

    Raises:
        ConfigError: it is not of that form.
    """
    try:
        return tuple(chain.from_iterable([str(kind) for kind in kinds] * min(times, 10_000) for kinds, times in stated))
    except (TypeError, ValueError):
        raise ConfigError(
            f"config.json:\n  attention_types: expected pairs of kinds and how often they repeat, found "
            f"{in_words(stated)}"
        ) from None


class Block(nn.Module):
    """One layer: attention, then feed-forward, each of normalised inputs and then added."""

    config: GPTNeoConfig

    @nn.compact
    def __call__(
        self,
        hidden: Array,
        segment_ids: Segments,
        rows: Rows,
        *,
        window: tuple[int, int] | None,
        deterministic: bool,
    ) -> Array:
        """Transform hidden states [B, L, E] -> [B, L, E]."""
        c = self.config
        attention = Attention(
            c.width,
            c.heads,
            c.attention_dropout,
            c.initializer,
            c.dtype,
            c.attention_implementation,
            causal=True,
            use_bias=False,
            scale=1.0,
            window=window,
            name="attention",
        )
        feed_forward = FeedForward(c.feed_forward, c.activation, c.initializer, c.dtype, name="feed_forward")

        normed = LayerNorm(c.norm_epsilon, c.dtype, name="attention_norm")(hidden)
        attended = attention(normed, segment_ids, rows, deterministic=deterministic)
        hidden = hidden + Dropout(c.dropout)(attended, rows, deterministic=deterministic)
        normed = LayerNorm(c.norm_epsilon, c.dtype, name="feed_forward_norm")(hidden)
        return hidden + Dropout(c.dropout)(feed_forward(normed), rows, deterministic=deterministic)


class GPTNeo(Encoder):
    """The decoder, without the products with the word embeddings."""

    config: GPTNeoConfig  # pyright: ignore[reportIncompatibleVariableOverride] (modules are frozen)
    pooler: bool = False

    def setup(self) -> None:
        c = self.config
        self.embeddings = Embeddings(c)
        self.layers = Block(c)
        self.final_norm = LayerNorm(c.norm_epsilon, c.dtype)

    def leave(self, hidden: Array) -> Array:
        """Compute the output from the last layer's."""
        return self.final_norm(hidden)


def decoder_entries(c: GPTNeoConfig, prefix: str, path: tuple[str, ...], *, pooler: bool) -> list[Entry]:
    """Return the decoder's entries, with stored names under `prefix` and parameters at `path`; there is no pooler."""
    del pooler
    n, width, heads, inner = c.layers, (c.width,), (c.heads, c.width // c.heads), (c.feed_forward,)
    layer, at, embeddings = f"{prefix}h.{{layer}}.", (*path, "layers"), (*path, "embeddings")
    attention = f"{layer}attn.attention."
    return [
        Entry(f"{prefix}wte.weight", (*embeddings, "word", "embedding"), same(c.vocab_size, c.width)),
        Entry(f"{prefix}wpe.weight", (*embeddings, "position", "embedding"), same(c.positions, c.width)),
        *norm_entries(f"{layer}ln_1", (*at, "attention_norm"), c.width, n),
        *(
            entry
            for part in ("query", "key", "value")
            for entry in linear_entries(
                f"{attention}{part[0]}_proj", (*at, "attention", part), width, heads, n, bias=False
            )
        ),
        *linear_entries(f"{attention}out_proj", (*at, "attention", "out"), heads, width, n),
        *norm_entries(f"{layer}ln_2", (*at, "feed_forward_norm"), c.width, n),
        *linear_entries(f"{layer}mlp.c_fc", (*at, "feed_forward", "inner"), width, inner, n),
        *linear_entries(f"{layer}mlp.c_proj", (*at, "feed_forward", "outer"), inner, width, n),
        *norm_entries(f"{prefix}ln_f", (*path, "final_norm"), c.width),
    ]


def _buffers(c: GPTNeoConfig, prefix: str) -> dict[str, np.ndarray]:
    windows = {layer: c.window_size for layer, kind in enumerate(c.types) if kind == LOCAL}
    return causal_masks(c, f"{prefix}h.{{layer}}.attn.attention", -1e9, windows)


FAMILY = Family(
    config=GPTNeoConfig,
    title="GPT-Neo",
    paper="Black et al. 2021",
    tokenizers=("byte-bpe",),
    tokenizer_like="gpt2",
    architectures=architectures(
        EncoderParts(
            GPTNeo,
            decoder_entries,
            prefix="transformer.",
            classes="GPTNeo",
            pooler=False,
            buffers=_buffers,
        ),
        {
            "causal_lm": Form(names=("lm_head",)),
            "classification": Form(names=("score",), last_bias=False),
            "tokens": Form(),
            "span": Form(names=("qa_outputs",)),
        },
    ),
    objectives=("causal",),
    above=("final_norm",),
)
