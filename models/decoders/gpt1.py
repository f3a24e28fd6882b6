"""GPT: a decoder that is pretrained to predict the next token and then fine-tuned.

Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training".

What sets it apart from its neighbours: layers normalised after each addition (post-norm) and no norm after the last,
learnt positions, GELU by its tanh approximation, logits that are products with the word embeddings, without a bias. New
weights are drawn from N(0, 0.02²) (4.1).

The authors' code has one table of words and positions, drops entries of that table, and predicts words with the same
dropped table; here, as in the reference implementation, the two tables are apart, and the sum of a token's vectors is
dropped. Released checkpoints store linear maps [inputs, outputs] (`Conv1D`), with query, key and value in one tensor,
and some contain the causal mask of each layer. Their config.json calls the activation "gelu".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import flax.linen as nn
import numpy as np
from jax import Array

from ..checkpoints.tables import Entry, Untransposed, fused_entries, linear_entries, norm_entries, same
from ..decoder import DecoderConfig, Embeddings, causal_masks
from ..encoder import Encoder
from ..family import Family
from ..heads.with_head import DOUBLE, EncoderParts, Form, architectures
from ..layers.attention import Attention
from ..layers.dropout import Dropout
from ..layers.feed_forward import FeedForward
from ..layers.norms import LayerNorm
from ..layers.segments import Rows, Segments

STORED_ACTIVATIONS = {"gelu": "gelu_new", "relu": "relu", "silu": "silu", "swish": "swish"}
"""`afn` in config.json -> name in layers.ACTIVATIONS."""


@dataclass(frozen=True)
class GPT1Config(DecoderConfig):
    """Sizes and settings of a GPT. The defaults are those of the released model (4.1)."""

    MODEL_TYPE: ClassVar[str] = "openai-gpt"
    KEYS: ClassVar[Mapping[str, str]] = {**DecoderConfig.KEYS, "activation": "afn"}
    REQUIRED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **DecoderConfig.REQUIRED,
        "afn": tuple(STORED_ACTIVATIONS.values()),
    }
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"openai-gpt": {}}

    vocab_size: int = 40_478
    positions: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feed_forward != 4 * self.width:
            raise ValueError(f"GPT1Config: expected a feed_forward of 4 times the width, found {self.feed_forward}")
        if self.activation not in STORED_ACTIVATIONS.values():
            expected = ", ".join(dict.fromkeys(STORED_ACTIVATIONS.values()))
            raise ValueError(f"GPT1Config: activation: expected one of {expected}, found {self.activation!r}")

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], **more: Any) -> Self:
        """See `FamilyConfig.from_json`."""
        width, activation = stored.get("n_embd", cls.width), stored.get("afn")
        if isinstance(activation, str):
            stored = {**stored, "afn": STORED_ACTIVATIONS.get(activation, activation)}
        return super().from_json(stored, feed_forward=4 * width if isinstance(width, int) else 0, **more)

    def to_json(self) -> dict[str, Any]:
        """See `FamilyConfig.to_json`."""
        named = {own: stored for stored, own in STORED_ACTIVATIONS.items()}
        return super().to_json() | {"afn": named[self.activation]}


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added and then normalised (Vaswani et al. 2017, 3.1)."""

    config: GPT1Config

    @nn.compact
    def __call__(self, hidden: Array, segment_ids: Segments, rows: Rows, *, deterministic: bool) -> Array:
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
            name="attention",
        )
        feed_forward = FeedForward(c.feed_forward, c.activation, c.initializer, c.dtype, name="feed_forward")

        attended = attention(hidden, segment_ids, rows, deterministic=deterministic)
        attended = Dropout(c.dropout)(attended, rows, deterministic=deterministic)
        hidden = LayerNorm(c.norm_epsilon, c.dtype, name="attention_norm")(hidden + attended)
        fed = Dropout(c.dropout)(feed_forward(hidden), rows, deterministic=deterministic)
        return LayerNorm(c.norm_epsilon, c.dtype, name="feed_forward_norm")(hidden + fed)


class GPT1(Encoder):
    """The decoder, without the products with the word embeddings."""

    config: GPT1Config  # pyright: ignore[reportIncompatibleVariableOverride] (modules are frozen)
    pooler: bool = False

    def setup(self) -> None:
        self.embeddings = Embeddings(self.config)
        self.layers = Block(self.config)


def decoder_entries(c: GPT1Config, prefix: str, path: tuple[str, ...], *, pooler: bool) -> list[Entry]:
    """Return the decoder's entries, with stored names under `prefix` and parameters at `path`; there is no pooler."""
    del pooler
    n, width, heads, inner = c.layers, (c.width,), (c.heads, c.width // c.heads), (c.feed_forward,)
    layer, at, embeddings = f"{prefix}h.{{layer}}.", (*path, "layers"), (*path, "embeddings")
    parts = [(*at, "attention", part) for part in ("query", "key", "value")]
    fused, linear = (partial(make, kernel=Untransposed) for make in (fused_entries, linear_entries))
    return [
        Entry(f"{prefix}tokens_embed.weight", (*embeddings, "word", "embedding"), same(c.vocab_size, c.width)),
        Entry(f"{prefix}positions_embed.weight", (*embeddings, "position", "embedding"), same(c.positions, c.width)),
        *fused(f"{layer}attn.c_attn", parts, width, heads, n),
        *linear(f"{layer}attn.c_proj", (*at, "attention", "out"), heads, width, n),
        *norm_entries(f"{layer}ln_1", (*at, "attention_norm"), c.width, n),
        *linear(f"{layer}mlp.c_fc", (*at, "feed_forward", "inner"), width, inner, n),
        *linear(f"{layer}mlp.c_proj", (*at, "feed_forward", "outer"), inner, width, n),
        *norm_entries(f"{layer}ln_2", (*at, "feed_forward_norm"), c.width, n),
    ]


def _buffers(c: GPT1Config, prefix: str) -> dict[str, np.ndarray]:
    return causal_masks(c, f"{prefix}h.{{layer}}.attn", -1e4)


FAMILY = Family(
    config=GPT1Config,
    title="GPT",
    paper="Radford et al. 2018",
    tokenizers=("word-bpe",),
    architectures=architectures(
        EncoderParts(
            GPT1,
            decoder_entries,
            prefix="transformer.",
            classes="OpenAIGPT",
            pooler=False,
            buffers=_buffers,
            endings=(("causal_lm", "LMHeadModel"), ("choice", DOUBLE)),
        ),
        {
            "causal_lm": Form(names=("lm_head",)),
            "classification": Form(names=("score",), last_bias=False),
            "choice": Form(names=("multiple_choice_head.summary",)),
        },
    ),
    objectives=("causal",),
    delimited=True,
)
