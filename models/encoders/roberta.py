"""RoBERTa: BERT's encoder, pretrained only on masked words, for longer and on more text.

Liu et al. 2019, "RoBERTa: A Robustly Optimized BERT Pretraining Approach"; multilingual: Conneau et al. 2020,
"Unsupervised Cross-lingual Representation Learning at Scale" (XLM-R).

What sets it apart from its neighbours: positions are counted from the padding token's id plus one (fairseq's
convention), so that the position table has two rows more than the longest example has tokens; one token type;
classification by its own head on <s>, a dense layer with dropout before and after it; a pooler only for multiple
choice.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ..encoder import Encoder, check_length
from ..family import EncoderConfig, Family
from ..heads.with_head import EncoderParts, Form, architectures
from ..layers.dropout import Dropout
from ..layers.linear import Embed
from ..layers.norms import LayerNorm
from ..layers.segments import Rows
from .bert import Block, encoder_entries


def _size(layers: int, width: int, vocab_size: int = 50_265) -> dict[str, Any]:
    """Return the fields of a size: heads of 64, four times the width in feed-forward, examples of up to 512 tokens."""
    return {
        "layers": layers,
        "width": width,
        "heads": width // 64,
        "feed_forward": 4 * width,
        "vocab_size": vocab_size,
        "positions": 514,
        "token_types": 1,
        "norm_epsilon": 1e-5,
    }


@dataclass(frozen=True)
class RobertaConfig(EncoderConfig):
    """Sizes and settings of a RoBERTa. The defaults are the reference implementation's, for keys that a file lacks."""

    MODEL_TYPE: ClassVar[str] = "roberta"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # The small sizes are BERT's (Turc et al. 2019): the paper has base and large.
        "roberta-tiny": _size(2, 128),
        "roberta-mini": _size(4, 256),
        "roberta-small": _size(4, 512),
        "roberta-base": _size(12, 768),
        "roberta-large": _size(24, 1024),
    }

    vocab_size: int = 50_265
    token_types: int = 2
    pad_token_id: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pad_token_id is None:
            raise ValueError("RobertaConfig: positions are counted from pad_token_id, which is None")

    @property
    def first_position(self) -> int:
        """Row of an example's first token in the position table."""
        assert self.pad_token_id is not None
        return self.pad_token_id + 1

    @property
    def max_length(self) -> int:
        """Maximum length of an example, in tokens."""
        return self.positions - self.first_position


@dataclass(frozen=True)
class XlmRobertaConfig(RobertaConfig):
    """Sizes and settings of an XLM-R: RoBERTa with a SentencePiece vocabulary of a hundred languages."""

    MODEL_TYPE: ClassVar[str] = "xlm-roberta"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "xlm-roberta-base": _size(12, 768, 250_002),
        "xlm-roberta-large": _size(24, 1024, 250_002),
    }


class Embeddings(nn.Module):
    """The sum of word, position and sentence vectors, normalised; padding has a position of its own."""

    config: RobertaConfig

    def setup(self) -> None:
        c = self.config
        embed = partial(Embed, width=c.width, embedding_init=c.initializer, dtype=c.dtype)
        self.word = embed(c.vocab_size, axis="vocab", padding_id=c.pad_token_id)
        self.position = embed(c.positions, axis="positions", padding_id=c.pad_token_id)
        self.token_type = embed(c.token_types, axis="types")
        self.norm = LayerNorm(c.norm_epsilon, dtype=c.dtype)
        self.drop = Dropout(c.dropout)

    def __call__(
        self,
        input_ids: Array,
        position_ids: Array | None,
        token_type_ids: Array | None = None,
        *,
        rows: Rows,
        deterministic: bool,
    ) -> Array:
        c = self.config
        length = input_ids.shape[1]
        check_length(c, length)
        if position_ids is None:
            real = input_ids != c.pad_token_id
            position_ids = jnp.where(real, jnp.cumsum(real, axis=1, dtype=jnp.int32), 0) - 1  # padding is at -1
        if token_type_ids is None:
            token_type_ids = jnp.zeros((1, length), jnp.int32)
        elif c.token_types < 2:
            raise ValueError("this model has only one token type: it takes no token_type_ids")
        positions = self.position(position_ids + c.first_position)
        hidden = self.word(input_ids) + self.token_type(token_type_ids) + positions
        return self.drop(self.norm(hidden), rows, deterministic=deterministic)


class Roberta(Encoder):
    """The encoder, with its pooler unless `pooler` is off."""

    config: RobertaConfig  # pyright: ignore[reportIncompatibleVariableOverride] (modules are frozen)

    def setup(self) -> None:
        self.embeddings = Embeddings(self.config)
        self.layers = Block(self.config)
        if self.pooler:
            self.pool = self.make_pooler()


PARTS = EncoderParts(Roberta, encoder_entries, prefix="roberta.", classes="Roberta")
FORMS = {
    "masked_lm": Form(names=("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder")),
    "classification": Form(transform="tanh", drop_first=True, names=("classifier.dense", "classifier.out_proj")),
    "tokens": Form(),
    "span": Form(names=("qa_outputs",)),
    "choice": Form(pooler=True),
}
FAMILY = Family(
    config=RobertaConfig,
    title="RoBERTa",
    paper="Liu et al. 2019",
    tokenizers=("byte-bpe",),
    architectures=architectures(PARTS, FORMS),
    objectives=("mlm",),
    rows="full-sentences",
)
XLM = Family(
    config=XlmRobertaConfig,
    title="XLM-R",
    paper="Conneau et al. 2020",
    tokenizers=("unigram",),
    architectures=architectures(PARTS._replace(classes="XLMRoberta"), FORMS),
    objectives=("mlm",),
    rows="full-sentences",
)
