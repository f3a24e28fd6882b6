"""Marian: the Transformer as trained by Marian NMT, such as the released OPUS-MT translators.

Junczys-Dowmunt et al. 2018, "Marian: Fast Neural Machine Translation in C++"; Tiedemann and Thottingal 2020, "OPUS-MT".

It has the network of `transformer.py`, with Swish, all sines of a position before all cosines, a constant added to each
word's logit, and decoding that starts with the padding token, whose vector is zero and whose id is the last. A
Transformer that differs only in the order of a position's channels and of its words becomes a Marian model by
reordering both (`from_transformer`), and with that a checkpoint that the reference implementation and CTranslate2 load.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from ..checkpoints.config import ConfigError
from ..checkpoints.tables import Params, flatten
from ..encoder_decoder import TOKEN_KEYS
from .transformer import SHARED_KEYS, Transformer, TransformerConfig, make_family

TYING_KEYS = ("share_encoder_decoder_embeddings", "tie_word_embeddings")


@dataclass(frozen=True)
class MarianConfig(TransformerConfig):
    """Sizes and settings of a Marian model. The defaults are the reference implementation's."""

    MODEL_TYPE: ClassVar[str] = "marian"
    KEYS: ClassVar[Mapping[str, str]] = {**SHARED_KEYS, "target_vocab_size": "decoder_vocab_size"}
    REQUIRED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "is_encoder_decoder": (True,),
        "static_position_embeddings": (True,),
        "normalize_before": (False,),
        "normalize_embedding": (False,),
        "add_final_layer_norm": (False,),
        "extra_pos_embeddings": (0,),
        "encoder_layerdrop": (0, 0.0),
        "decoder_layerdrop": (0, 0.0),
        "quantization_config": (None,),
    }
    WRITTEN_ANEW: ClassVar[tuple[str, ...]] = (*TransformerConfig.WRITTEN_ANEW, *TYING_KEYS)
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    vocab_size: int = 58_101
    width: int = 1024
    encoder_layers: int = 12
    decoder_layers: int = 12
    encoder_heads: int = 16
    decoder_heads: int = 16
    encoder_feed_forward: int = 4096
    decoder_feed_forward: int = 4096
    activation: str = "gelu"
    sinusoids: str = "halves"
    scale_embeddings: bool = False
    logits_bias: bool = True
    pad_token_id: int = 58_100
    eos_token_id: int = 0
    bos_token_id: int | None = None
    decoder_start_token_id: int = 58_100
    forced_eos_token_id: int | None = 0

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], **more: Any) -> Self:
        """See `FamilyConfig.from_json`."""
        shared, tied = (stored.get(key, True) for key in TYING_KEYS)
        if shared and not tied:
            raise ConfigError("config.json:\n  tie_word_embeddings: only true is implemented with shared embeddings")
        return super().from_json(stored, tying="all" if shared else "decoder" if tied else "none", **more)

    def to_json(self) -> dict[str, Any]:
        """See `FamilyConfig.to_json`."""
        tying = dict(zip(TYING_KEYS, (self.tying == "all", self.tying != "none"), strict=True))
        return super().to_json() | tying | {"decoder_vocab_size": self.target_words}


class Marian(Transformer):
    """The network of `transformer.py`, under the released checkpoints' name; they store the vector of padding."""

    ZERO_PADDING: ClassVar[bool] = False
    config: MarianConfig  # pyright: ignore[reportIncompatibleVariableOverride] (modules are frozen)


def from_transformer(
    model: Transformer, params: Params, *, padding_last: bool = False
) -> tuple[Marian, dict[str, Any]]:
    """Convert a Transformer to the equivalent Marian model: reorder the channels from interleaved positions to halves.

    The function does not depend on the order of the channels, as long as it is the same in all parameters. Where one
    table serves inputs and outputs, padding's row becomes that of the inputs, zero; padding is never generated.

    Args:
        model: a model of `transformer.py`.
        params: its parameters on the host, unboxed.
        padding_last: whether to make padding, the first word, the last one, and every other word the one before it.

    Raises:
        ValueError: Marian cannot represent the model: it is pre-norm, or has another embedding width; or padding is not
            the first word.
    """
    c = model.config
    unlike = {"pre_norm": c.pre_norm, "embedding_width": c.table_width != c.width}
    if any(unlike.values()):
        found = " and no ".join(name for name, differs in unlike.items() if differs)
        raise ValueError(f"the reference implementation's Marian has no {found}: not converted")
    fields = {field.name: getattr(c, field.name) for field in dataclasses.fields(c)}
    fields |= {"sinusoids": "halves", "logits_bias": True}
    if padding_last:
        if c.pad_token_id:
            raise ValueError(f"padding is word {c.pad_token_id}; expected the first")
        tokens = {name: fields[name] for name in TOKEN_KEYS if fields[name] is not None}
        fields |= {name: (token - 1) % c.target_words for name, token in tokens.items()}
    order = np.arange(c.width)
    if c.sinusoids == "interleaved":
        order = np.concatenate([order[0::2], order[1::2]])
    moved: dict[str, Any] = {}
    for path, leaf in flatten(params):
        branch = moved
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = _reordered(path, np.asarray(leaf), order)
    if not c.logits_bias:
        moved["final_logits_bias"] = np.zeros(c.target_words, np.float32)
    for name in ("source", "target"):
        if name in moved:
            table = moved[name]["embedding"].copy()
            table[c.pad_token_id] = 0.0
            moved[name]["embedding"] = table
    if padding_last:
        for name in ("source", "target", "output"):
            if name in moved:
                moved[name]["embedding"] = np.roll(moved[name]["embedding"], -1, axis=0)
        moved["final_logits_bias"] = np.roll(moved["final_logits_bias"], -1)
    return Marian(MarianConfig(**fields)), moved


def _reordered(path: tuple[str, ...], leaf: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Reorder the channels of the hidden states in a parameter, on whichever axis has them."""
    match path:
        case (_, "embedding") | (*_, "out" | "outer", "kernel" | "bias") | (*_, "scale"):
            return leaf[..., order]
        case (*_, "attention_norm" | "cross_attention_norm" | "feed_forward_norm", "bias"):
            return leaf[..., order]
        case (*_, "query" | "key" | "value" | "inner", "kernel"):
            return leaf[:, order]
    return leaf


FAMILY = make_family(
    MarianConfig,
    "MarianMTModel",
    Marian,
    title="Marian",
    paper="Junczys-Dowmunt et al. 2018",
    tokenizers=("unigram", "bpe"),
)
