"""What decoders without a source share: their config, the embeddings of words and positions, stored causal masks.

A decoder's layers are an encoder's that look back only, so that it is an `Encoder` whose layers are causal, with the
same task heads, and `heads.causal_lm` to predict the next token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn.initializers import Initializer

from .encoder import check_length
from .family import EncoderConfig
from .layers.dropout import Dropout
from .layers.linear import Embed
from .layers.segments import Rows


@dataclass(frozen=True)
class DecoderConfig(EncoderConfig):
    """Base of the configs of GPT-1, GPT-2 and their relatives; heads over whole examples read the last token."""

    KEYS: ClassVar[Mapping[str, str]] = {
        "vocab_size": "vocab_size",
        "width": "n_embd",
        "layers": "n_layer",
        "heads": "n_head",
        "positions": "n_positions",
        "dropout": "resid_pdrop",
        "embedding_dropout": "embd_pdrop",
        "attention_dropout": "attn_pdrop",
        "choice_dropout": "summary_first_dropout",
        "norm_epsilon": "layer_norm_epsilon",
        "initializer_range": "initializer_range",
        "pad_token_id": "pad_token_id",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "problem_type": "problem_type",
    }
    REQUIRED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "add_cross_attention": (False,),
        "is_encoder_decoder": (False,),
        "tie_word_embeddings": (True,),
        "pruned_heads": ({}, None),
        "quantization_config": (None,),
        "problem_type": EncoderConfig.REQUIRED["problem_type"],
        "summary_type": ("cls_index",),
        "summary_use_proj": (True,),
        "summary_activation": (None,),
        "summary_proj_to_labels": (True,),
    }

    vocab_size: int = 50_257
    positions: int = 1024
    activation: str = "gelu_new"
    embedding_dropout: float = 0.1
    """dropout rate of the embeddings"""
    choice_dropout: float = 0.1
    """dropout rate of the inputs of a multiple-choice head"""
    norm_epsilon: float = 1e-5
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    """token that begins a text, if the tokenizer has one"""
    eos_token_id: int | None = None
    """token that ends a text, and an output; None: outputs have no end"""

    @property
    def initializer(self) -> Initializer:
        """Initialiser of new kernels and embeddings."""
        return nn.initializers.normal(self.initializer_range)

    @property
    def position_initializer(self) -> Initializer:
        """Initialiser of new position embeddings."""
        return self.initializer

    @property
    def pooling(self) -> str:
        """See `EncoderConfig.pooling`: "last", the last token, which has seen all others."""
        return "last"

    def head_dropout(self, head: str) -> float:
        """See `EncoderConfig.head_dropout`."""
        if head == "choice":
            return self.choice_dropout
        return super().head_dropout(head) if head in ("tokens", "crf") else 0.0

    def dropout_fields(self, rate: float) -> dict[str, float]:
        """See `EncoderConfig.dropout_fields`."""
        return {**super().dropout_fields(rate), "embedding_dropout": rate}

    @classmethod
    def vocabulary_fields(cls, size: int, ids: Mapping[str, int]) -> dict[str, Any]:
        """See `EncoderConfig.vocabulary_fields`."""
        ends = {f"{role}_token_id": ids.get(role) for role in ("pad", "bos", "eos")}
        return {**super().vocabulary_fields(size, ids), **ends}


class Embeddings(nn.Module):
    """The sum of word and position vectors."""

    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        embed = partial(Embed, width=c.width, dtype=c.dtype)
        self.word = embed(c.vocab_size, axis="vocab", embedding_init=c.initializer)
        self.position = embed(c.positions, axis="positions", embedding_init=c.position_initializer)
        self.drop = Dropout(c.embedding_dropout)

    def __call__(self, input_ids: Array, position_ids: Array | None, *, rows: Rows, deterministic: bool) -> Array:
        length = input_ids.shape[1]
        if position_ids is None:
            check_length(self.config, length)
            position_ids = jnp.arange(length)[None]
        hidden = self.word(input_ids) + self.position(position_ids)
        return self.drop(hidden.astype(self.config.dtype), rows, deterministic=deterministic)


def causal_masks(
    config: DecoderConfig, name: str, hidden_score: float, windows: Mapping[int, int] | None = None
) -> dict[str, np.ndarray]:
    """Return the buffers of causal masks in older checkpoints: name -> value.

    Args:
        config: config of the model.
        name: stored name of a layer's attention, with `{layer}`.
        hidden_score: the score of hidden tokens, which is stored too.
        windows: layer -> number of tokens that it sees, its own included; None for all layers, and all tokens.
    """
    score = np.array(hidden_score, np.float32)
    found: dict[str, np.ndarray] = {}
    for layer in range(config.layers):
        stored = name.format(layer=layer)
        window = (windows or {}).get(layer, config.positions)
        found |= {f"{stored}.bias": _causal(config.positions, window), f"{stored}.masked_bias": score}
    return found


def _causal(length: int, window: int) -> np.ndarray:
    """Return [1, 1, length, length] bool, True where the query (row) sees the key: a view of a vector."""
    seen = np.arange(2 * length - 1) - (length - 1)  # key's position minus query's
    rows = np.lib.stride_tricks.sliding_window_view((seen <= 0) & (seen > -window), length)
    return rows[::-1][None, None]
