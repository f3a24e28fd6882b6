"""BART: a bidirectional encoder and a left-to-right decoder, pretrained to restore corrupted text.

Lewis et al. 2020, "BART: Denoising Sequence-to-Sequence Pre-training for Natural Language Generation, Translation, and
Comprehension".

It has the layers of the Transformer, with exact GELU. What sets it apart: positions are learnt, those of the text after
two rows of the table that nothing uses; the sum of a word and its position is normalised; embeddings are not scaled
(but in some released checkpoints); a constant is added to each word's logit; decoding starts from `</s>`.

A classifier reads the whole text twice, by the encoder and by the decoder, and predicts from the decoder's state at the
last `</s>`; answers are found in the decoder's states (2.2, 3.1 and figure 3).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn.initializers import Initializer

from ..checkpoints.config import read_labels, write_labels
from ..checkpoints.encoder_decoder import encoder_decoder_entries, logits_bias_entry
from ..checkpoints.tables import Entry, Table, norm_entries, same
from ..encoder import Encoded
from ..encoder_decoder import EncoderDecoder, EncoderDecoderConfig, Side, logits_bias_init
from ..family import Architecture, Family, Path
from ..heads.with_head import EncoderParts, Form, architectures
from ..layers.activations import ACTIVATIONS
from ..layers.dropout import Dropout
from ..layers.linear import Embed
from ..layers.norms import LayerNorm
from ..layers.segments import Rows, Segments, gather_positions, split_segments
from .transformer import NORM_EPSILON, SHARED_KEYS, DecoderBlock, EncoderBlock

OFFSET = 2  # row of the table of the first position
LABELS = 3  # of a classifier whose config.json does not say, as in the reference implementation


def _size(layers: int, width: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "width": width,
        **{f"{side}_layers": layers for side in ("encoder", "decoder")},
        **{f"{side}_heads": heads for side in ("encoder", "decoder")},
        **{f"{side}_feed_forward": 4 * width for side in ("encoder", "decoder")},
        **more,
    }


@dataclass(frozen=True)
class BartConfig(EncoderDecoderConfig):
    """Sizes and settings of a BART model. The defaults are the reference implementation's, those of BART large."""

    MODEL_TYPE: ClassVar[str] = "bart"
    KEYS: ClassVar[Mapping[str, str]] = {
        **SHARED_KEYS,
        "classifier_dropout": "classifier_dropout",
        "initializer_range": "init_std",
        "problem_type": "problem_type",
    }
    REQUIRED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **EncoderDecoderConfig.REQUIRED,
        "activation_function": tuple(ACTIVATIONS),
        "tie_word_embeddings": (True,),
        "normalize_before": (False,),
        "normalize_embedding": (True,),
        "static_position_embeddings": (False,),
        "add_final_layer_norm": (False,),
        "add_bias_logits": (False,),
        "extra_pos_embeddings": (OFFSET,),
        "encoder_layerdrop": (0, 0.0),
        "decoder_layerdrop": (0, 0.0),
        "problem_type": (None, "regression", "single_label_classification", "multi_label_classification"),
    }
    WRITTEN_ANEW: ClassVar[tuple[str, ...]] = (
        *EncoderDecoderConfig.WRITTEN_ANEW,
        *("id2label", "label2id", "num_labels", "normalize_before"),
    )
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "bart-base": _size(6, 768, 12),
        "bart-large": _size(12, 1024, 16),
    }
    pre_norm: ClassVar[bool] = False
    tying: ClassVar[str] = "all"
    pooling: ClassVar[str] = "cls"
    token_types: ClassVar[int] = 0
    norm_epsilon: ClassVar[float] = NORM_EPSILON
    sets: ClassVar[None] = None

    vocab_size: int = 50_265
    width: int = 1024
    encoder_layers: int = 12
    decoder_layers: int = 12
    encoder_heads: int = 16
    """number of attention heads of the encoder; must divide the width"""
    decoder_heads: int = 16
    """number of attention heads of the decoder; must divide the width"""
    encoder_feed_forward: int = 4096
    """inner width of the encoder's feed-forward sub-layers"""
    decoder_feed_forward: int = 4096
    """inner width of the decoder's feed-forward sub-layers"""
    positions: int = 1024
    """maximum length of an example on either side, in tokens"""
    activation: str = "gelu"
    """activation function, a name in layers.ACTIVATIONS"""
    scale_embeddings: bool = False
    """multiply embeddings of words by the square root of the width"""
    attention_dropout: float = 0.0
    """dropout rate of attention probabilities"""
    activation_dropout: float = 0.0
    """dropout rate of the feed-forward sub-layers' inner activations"""
    classifier_dropout: float = 0.0
    """dropout rate of a classifier's inputs"""
    initializer_range: float = 0.02
    """standard deviation of new weights"""
    pad_token_id: int = 1
    bos_token_id: int | None = 0
    decoder_start_token_id: int = 2
    forced_eos_token_id: int | None = 2
    problem_type: str | None = None
    """type of a sequence classifier: regression, single_label_classification or multi_label_classification"""
    num_labels: int = LABELS
    """number of classes of a classifier"""
    label_names: tuple[str, ...] | None = None
    """names of the classes"""

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        for side in ("encoder", "decoder"):
            heads = getattr(self, f"{side}_heads")
            if self.width % heads:
                raise ValueError(f"{name}: width {self.width} is not a multiple of {side}_heads {heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"{name}: unknown activation {self.activation!r}; known: {', '.join(ACTIVATIONS)}")
        if self.label_names is not None and len(self.label_names) != self.num_labels:
            raise ValueError(f"{name}: {self.num_labels} labels, but {len(self.label_names)} label names")

    @property
    def max_length(self) -> int | None:
        """Maximum length of an example on either side, in tokens."""
        return self.positions

    @property
    def head_size(self) -> int:
        """Size of the decoder's heads, D."""
        return self.width // self.decoder_heads

    @property
    def table_width(self) -> int:
        """Size of the embeddings."""
        return self.width

    @property
    def layers(self) -> int:
        """Number of layers that a text passes, those of the encoder first."""
        return self.encoder_layers + self.decoder_layers

    @property
    def initializer(self) -> Initializer:
        """Initialiser of new kernels and embeddings."""
        return nn.initializers.normal(self.initializer_range)

    @property
    def head_initializer(self) -> Initializer:
        """Initialiser of the kernel of a head's last linear map."""
        return self.initializer

    def head_dropout(self, head: str) -> float:
        """Return the dropout rate of the inputs of a head's last linear map."""
        return 0.0 if head == "span" else self.classifier_dropout

    def dropout_fields(self, rate: float) -> dict[str, float]:
        """See `EncoderDecoderConfig.dropout_fields`."""
        return {"dropout": rate, "attention_dropout": rate, "activation_dropout": rate}

    @classmethod
    def vocabulary_fields(cls, size: int, ids: Mapping[str, int]) -> dict[str, Any]:
        """See `EncoderConfig.vocabulary_fields`. Outputs start from the token that ends texts."""
        end = ids.get("sep", ids.get("eos", 2))
        begin = ids.get("cls", ids.get("bos"))
        return {
            "vocab_size": size,
            "pad_token_id": ids.get("pad", 1),
            "bos_token_id": begin,
            **dict.fromkeys(("eos_token_id", "decoder_start_token_id", "forced_eos_token_id"), end),
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], **more: Any) -> Self:
        """See `FamilyConfig.from_json`."""
        count, names = read_labels({"num_labels": LABELS, **stored})
        return super().from_json(stored, num_labels=count, label_names=names, **more)

    def to_json(self) -> dict[str, Any]:
        """See `FamilyConfig.to_json`."""
        names = self.label_names
        if names is None and self.num_labels != LABELS:
            names = tuple(f"LABEL_{i}" for i in range(self.num_labels))
        stored = super().to_json() | ({} if names is None else write_labels(self.num_labels, names))
        if self.problem_type is None:
            del stored["problem_type"]
        return stored | {"normalize_before": False}  # which CTranslate2's converter reads, as released ones have it


class BartBase(EncoderDecoder):
    """Encoder and decoder, and what is before their layers."""

    config: BartConfig

    def setup(self) -> None:
        c = self.config
        words = partial(Embed, axis="vocab", dtype=c.dtype, padding_id=c.pad_token_id)
        self.source = words(c.vocab_size, c.width, embedding_init=c.initializer)
        places = partial(Embed, c.positions + OFFSET, c.width, "positions", c.initializer, c.dtype)
        self.encoder_positions, self.decoder_positions = places(), places()
        self.encoder_embedding_norm = LayerNorm(NORM_EPSILON, c.dtype)
        self.decoder_embedding_norm = LayerNorm(NORM_EPSILON, c.dtype)
        self.encoder, self.decoder = EncoderBlock(c), DecoderBlock(c)
        self.drop = Dropout(c.dropout)

    def embed(self, side: Side, ids: Array, position_ids: Array | None, *, rows: Rows, deterministic: bool) -> Array:
        """See `EncoderDecoder.embed`."""
        c = self.config
        if position_ids is None:
            if ids.shape[1] > c.positions:
                raise ValueError(f"a row has {ids.shape[1]} tokens, but the model has {c.positions} positions")
            position_ids = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
        places = self.encoder_positions if side == "encoder" else self.decoder_positions
        norm = self.encoder_embedding_norm if side == "encoder" else self.decoder_embedding_norm
        vectors = self.source(ids)
        vectors = vectors * c.width**0.5 if c.scale_embeddings else vectors
        return self.drop(norm(vectors + places(position_ids + OFFSET)), rows, deterministic=deterministic)

    @property
    def output_table(self) -> Embed:
        """See `EncoderDecoder.output_table`."""
        return self.source

    @nn.nowrap
    def decoder_block(self) -> DecoderBlock:
        """See `EncoderDecoder.decoder_block`."""
        return DecoderBlock(self.config, parent=None)


class Bart(BartBase):
    """BART as it generates: its logits have a constant per word, which is loaded and saved but not trained."""

    def setup(self) -> None:
        super().setup()
        words = (self.config.vocab_size,)
        self.final_logits_bias = self.param("final_logits_bias", logits_bias_init, words, jnp.float32)

    def logits_bias(self) -> Array:
        """See `EncoderDecoder.logits_bias`."""
        return self.final_logits_bias


class BartReader(BartBase):
    """BART as it reads a text: encoder and decoder read it, and the decoder's states represent it (figure 3).

    It has an encoder's interface, so that its heads are those of the encoders.
    """

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride] (it reads one text, not two)
        self,
        input_ids: Array,
        segment_ids: Segments = None,
        position_ids: Array | None = None,
        *,
        cls_positions: Array | None = None,
        rows: Rows | None = None,
        deterministic: bool = True,
        cls_only: bool = False,
    ) -> Encoded:
        """Read rows of tokens. Arguments as for `Encoder`, but `first` is the state at each example's last `</s>`."""
        c = self.config
        queries, keys = split_segments(segment_ids)
        queries = jnp.ones(input_ids.shape, jnp.int32) if queries is None else queries
        before = jnp.pad(queries[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        shifted = jnp.pad(input_ids[:, :-1], ((0, 0), (1, 0)))
        decoder_ids = jnp.where(queries != before, c.decoder_start_token_id, shifted)
        mode: dict[str, Any] = {"rows": rows, "deterministic": deterministic}
        memory = self.encode(input_ids, segment_ids, position_ids, **mode)
        hidden = self.decode(memory, segment_ids, decoder_ids, queries, position_ids, **mode)

        ends = input_ids == c.eos_token_id
        if cls_positions is None:
            own = ends if keys is None else ends & (keys > 0)
            own = own[:, None]
        else:
            examples = jnp.arange(1, cls_positions.shape[1] + 1, dtype=queries.dtype)
            own = ends[:, None] & (queries[:, None] == examples[None, :, None])
        last = jnp.max(jnp.where(own, jnp.arange(input_ids.shape[1])[None, None], 0), axis=-1)
        first = gather_positions(hidden, last)
        hidden = first if cls_only else hidden
        return Encoded(hidden, first[:, 0] if cls_positions is None else first, None, None)


def _entries(c: BartConfig, prefix: str, path: Path) -> list[Entry]:
    """Return the entries of everything but heads and the constants of the logits."""
    found, _ = encoder_decoder_entries(c)
    for side in ("encoder", "decoder"):
        stored = f"model.{side}"
        rows = same(c.positions + OFFSET, c.width)
        found.append(Entry(f"{stored}.embed_positions.weight", (f"{side}_positions", "embedding"), rows))
        found += norm_entries(f"{stored}.layernorm_embedding", (f"{side}_embedding_norm",), c.width)
    return [e._replace(name=prefix + e.name.removeprefix("model."), path=(*path, *e.path)) for e in found]


def _tied(prefix: str) -> dict[str, str]:
    names = (f"{prefix}encoder.embed_tokens.weight", f"{prefix}decoder.embed_tokens.weight", "lm_head.weight")
    return dict.fromkeys(names, f"{prefix}shared.weight")


def bart_table(c: BartConfig) -> Table:
    """Return the table of `Bart`."""
    entries = (*_entries(c, "model.", ()), logits_bias_entry(c.vocab_size))
    return Table(entries, prefix="model.", tied=_tied("model."))


class _Parts(EncoderParts):
    """BART as the heads of the encoders need it."""

    def table(self, config: Any, head: Any = (), tied: Any = None, *, pooler: bool, bare: bool = False) -> Table:
        del pooler
        prefix, path = ("", ()) if bare else ("model.", ("encoder",))
        return Table((*_entries(config, prefix, path), *head), prefix="model.", tied=_tied(prefix) | (tied or {}))


class _BartFamily(Family):
    """The family, whose texts pass two stacks of layers."""

    def is_encoder_parameter(self, path: Path) -> bool:
        """See `Family.is_encoder_parameter`."""
        return path[0] not in ("final_logits_bias", "transform", "classifier", "span")

    def depths(self, model: nn.Module) -> dict[Path, np.ndarray]:
        """See `Family.depths`. The decoder's layers are above the encoder's."""
        c: BartConfig = model.config  # type: ignore[attr-defined]
        found: dict[Path, np.ndarray] = {}
        for entry in self.checkpoint_table(model).entries:
            if entry.numbers is not None:
                below = c.encoder_layers if "decoder" in entry.path else 0
                depth = np.array(entry.numbers) + 1 + below
            else:
                depth = np.array(0 if self.is_encoder_parameter(entry.path) else c.layers + 1)
            found[entry.path[:-1]] = depth
        return found


PARTS = _Parts(BartReader, _entries, "model.", "Bart", pooler=False)
FORMS = {
    "classification": Form(
        transform="tanh", drop_first=True, names=("classification_head.dense", "classification_head.out_proj")
    ),
    "span": Form(names=("qa_outputs",)),
}

FAMILY = _BartFamily(
    config=BartConfig,
    title="BART",
    paper="Lewis et al. 2020",
    tokenizers=("byte-bpe",),
    architectures=(
        Architecture("BartForConditionalGeneration", "generation", Bart, bart_table),
        *(kind._replace(head="states") if kind.head == "encoder" else kind for kind in architectures(PARTS, FORMS)),
    ),
    objectives=("denoise",),
    mask_rate=0.3,
)
