"""GPT-2: a decoder that predicts the next token; and GPT-3, which has its layers.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; Brown et al. 2020, "Language Models are
Few-Shot Learners" (GPT-3).

What sets it apart from its neighbours: the input of each part is normalised, not the sum, and the last layer's output
once more (2.3); learnt positions; GELU by its tanh approximation; the logits are products with the word embeddings,
without a bias. In GPT-3 every second layer attends only to a band of the last tokens ("alternating dense and locally
banded sparse attention patterns", 2.1); the width of the band was never published, and 256 is GPT-Neo's.

New weights are drawn as in the paper (2.3) and its released code: words from N(0, 0.02²), positions from N(0, 0.01²),
linear maps from N(0, 0.02²), those that add to the residual stream divided by the square root of their number, 2N.

Released checkpoints store linear maps [inputs, outputs] (`Conv1D`), with query, key and value in one tensor; older ones
also contain the causal mask of each layer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import flax.linen as nn
import numpy as np
from jax import Array
from jax.nn.initializers import Initializer

from ..checkpoints.tables import Entry, Untransposed, fused_entries, linear_entries, norm_entries, same
from ..decoder import DecoderConfig, Embeddings, causal_masks
from ..encoder import Encoder
from ..family import Family
from ..heads.with_head import DOUBLE, EncoderParts, Form, architectures
from ..layers.activations import ACTIVATIONS
from ..layers.attention import Attention
from ..layers.dropout import Dropout
from ..layers.feed_forward import FeedForward
from ..layers.norms import LayerNorm
from ..layers.segments import Rows, Segments
from ..layers.stack import LayerKind


def _size(layers: int, width: int, heads: int, positions: int = 1024) -> dict[str, int]:
    """Return the fields of a size; its end-of-text token is the last of the vocabulary."""
    ends = {"bos_token_id": 50_256, "eos_token_id": 50_256}
    return {"layers": layers, "width": width, "heads": heads, "feed_forward": 4 * width, "positions": positions, **ends}


@dataclass(frozen=True)
class GPT2Config(DecoderConfig):
    """Sizes and settings of a GPT-2. The defaults are those of the small model."""

    MODEL_TYPE: ClassVar[str] = "gpt2"
    KEYS: ClassVar[Mapping[str, str]] = {
        **DecoderConfig.KEYS,
        "feed_forward": "n_inner",
        "activation": "activation_function",
        "classifier_dropout": "classifier_dropout",
        "scale_attention": "scale_attn_weights",
    }
    REQUIRED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **DecoderConfig.REQUIRED,
        "activation_function": tuple(ACTIVATIONS),
        "scale_attn_by_inverse_layer_idx": (False,),
    }
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Radford et al. 2019, table 2; the numbers of heads are those of the released checkpoints.
        "gpt2-small": _size(12, 768, 12),
        "gpt2-medium": _size(24, 1024, 16),
        "gpt2-large": _size(36, 1280, 20),
        "gpt2-xl": _size(48, 1600, 25),
        "gpt2-tiny": _size(4, 128, 4),  # not released: to try things out
    }

    scale_attention: bool = True
    """divide the attention scores by the square root of the head size"""

    @property
    def out_initializer(self) -> Initializer:
        """Initialiser of the maps that add to the residual stream (2.3)."""
        return nn.initializers.normal(self.initializer_range / math.sqrt(2 * self.layers))

    @property
    def position_initializer(self) -> Initializer:
        """Initialiser of the position embeddings, half as large as the others in the released code."""
        return nn.initializers.normal(self.initializer_range / 2)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], **more: Any) -> Self:
        """See `FamilyConfig.from_json`. A feed-forward width of null is four times the width."""
        width, inner = stored.get("n_embd", cls.width), cls.KEYS["feed_forward"]
        if stored.get(inner) is None and isinstance(width, int):
            stored = {**stored, inner: 4 * width}
        return super().from_json(stored, **more)

    def to_json(self) -> dict[str, Any]:
        """See `FamilyConfig.to_json`."""
        stored = super().to_json()
        return stored | {"n_inner": None} if self.feed_forward == 4 * self.width else stored


@dataclass(frozen=True)
class GPT3Config(GPT2Config):
    """Sizes and settings of a GPT-3, of which no checkpoint was released. The defaults are those of the small model."""

    MODEL_TYPE: ClassVar[str] = "gpt3"
    KEYS: ClassVar[Mapping[str, str]] = {**GPT2Config.KEYS, "band_size": "band_size"}
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Brown et al. 2020, table 2.1, but for two rows whose numbers contradict each other.
        "gpt3-small": _size(12, 768, 12, 2048),
        "gpt3-medium": _size(24, 1024, 16, 2048),
        "gpt3-large": _size(24, 1536, 16, 2048),
        "gpt3-xl": _size(24, 2048, 16, 2048),  # there: 24 heads of 128, but 1.3 billion parameters are those of 16
        "gpt3-2.7b": _size(32, 2560, 32, 2048),
        "gpt3-6.7b": _size(32, 4096, 32, 2048),
        "gpt3-13b": _size(40, 5120, 40, 2048),  # there: a width of 5,140, which is not 40 heads of 128
        "gpt3-175b": _size(96, 12_288, 96, 2048),
    }

    positions: int = 2048
    band_size: int = 256
    """number of tokens that a token of a banded layer attends to, its own included"""

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Window of each layer: dense and banded ones in turn, dense first."""
        windows = (None, (self.band_size - 1, 0))
        return tuple({"window": windows[layer % 2]} for layer in range(self.layers))


class Block(nn.Module):
    """One layer: attention, then feed-forward, each of normalised inputs and then added (2.3)."""

    config: GPT2Config

    @nn.compact
    def __call__(
        self,
        hidden: Array,
        segment_ids: Segments,
        rows: Rows,
        *,
        window: tuple[int, int] | None = None,
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
            scale=None if c.scale_attention else 1.0,
            window=window,
            out_init=c.out_initializer,
            name="attention",
        )
        feed_forward = FeedForward(
            c.feed_forward, c.activation, c.initializer, c.dtype, out_init=c.out_initializer, name="feed_forward"
        )

        normed = LayerNorm(c.norm_epsilon, c.dtype, name="attention_norm")(hidden)
        attended = attention(normed, segment_ids, rows, deterministic=deterministic)
        hidden = hidden + Dropout(c.dropout)(attended, rows, deterministic=deterministic)
        normed = LayerNorm(c.norm_epsilon, c.dtype, name="feed_forward_norm")(hidden)
        return hidden + Dropout(c.dropout)(feed_forward(normed), rows, deterministic=deterministic)


class GPT2(Encoder):
    """The decoder, without the products with the word embeddings."""

    config: GPT2Config  # pyright: ignore[reportIncompatibleVariableOverride] (modules are frozen)
    pooler: bool = False

    def setup(self) -> None:
        c = self.config
        self.embeddings = Embeddings(c)
        self.layers = Block(c)
        self.final_norm = LayerNorm(c.norm_epsilon, c.dtype)

    def leave(self, hidden: Array) -> Array:
        """Compute the output from the last layer's."""
        return self.final_norm(hidden)


def decoder_entries(c: GPT2Config, prefix: str, path: tuple[str, ...], *, pooler: bool) -> list[Entry]:
    """Return the decoder's entries, with stored names under `prefix` and parameters at `path`; there is no pooler."""
    del pooler
    n, width, heads, inner = c.layers, (c.width,), (c.heads, c.width // c.heads), (c.feed_forward,)
    layer, at, embeddings = f"{prefix}h.{{layer}}.", (*path, "layers"), (*path, "embeddings")
    parts = [(*at, "attention", part) for part in ("query", "key", "value")]
    fused, linear = (partial(make, kernel=Untransposed) for make in (fused_entries, linear_entries))
    return [
        Entry(f"{prefix}wte.weight", (*embeddings, "word", "embedding"), same(c.vocab_size, c.width)),
        Entry(f"{prefix}wpe.weight", (*embeddings, "position", "embedding"), same(c.positions, c.width)),
        *norm_entries(f"{layer}ln_1", (*at, "attention_norm"), c.width, n),
        *fused(f"{layer}attn.c_attn", parts, width, heads, n),
        *linear(f"{layer}attn.c_proj", (*at, "attention", "out"), heads, width, n),
        *norm_entries(f"{layer}ln_2", (*at, "feed_forward_norm"), c.width, n),
        *linear(f"{layer}mlp.c_fc", (*at, "feed_forward", "inner"), width, inner, n),
        *linear(f"{layer}mlp.c_proj", (*at, "feed_forward", "outer"), inner, width, n),
        *norm_entries(f"{prefix}ln_f", (*path, "final_norm"), c.width),
    ]


def _buffers(c: GPT2Config, prefix: str) -> dict[str, np.ndarray]:
    return causal_masks(c, f"{prefix}h.{{layer}}.attn", -1e4)


FORMS = {
    "causal_lm": Form(names=("lm_head",)),
    "classification": Form(names=("score",), last_bias=False),
    "tokens": Form(),
    "span": Form(names=("qa_outputs",)),
    "choice": Form(names=("multiple_choice_head.summary",)),
}
PARTS = EncoderParts(
    GPT2,
    decoder_entries,
    prefix="transformer.",
    classes="GPT2",
    pooler=False,
    buffers=_buffers,
    endings=(("causal_lm", "LMHeadModel"), ("choice", DOUBLE)),
)
FAMILY = Family(
    config=GPT2Config,
    title="GPT-2",
    paper="Radford et al. 2019",
    tokenizers=("byte-bpe",),
    tokenizer_like="gpt2",
    architectures=architectures(PARTS, FORMS),
    objectives=("causal",),
    above=("final_norm",),
)
GPT3 = Family(
    config=GPT3Config,
    title="GPT-3",
    paper="Brown et al. 2020",
    tokenizers=("byte-bpe",),
    tokenizer_like="gpt2",
    architectures=architectures(PARTS._replace(classes="GPT3"), FORMS),
    objectives=("causal",),
    above=("final_norm",),
)
