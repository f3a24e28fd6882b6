"""ELECTRA: BERT's encoder, pretrained to tell which words of a text a small generator has replaced.

Clark et al. 2020, "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators".

What sets it apart from its neighbours: two networks, a discriminator, which is what is fine-tuned, and a smaller
generator, a masked language model with the same embeddings; word, position and sentence vectors may be smaller than the
hidden states, to which a linear map of each network leads; no pooler; classification by a dense layer and GELU on
[CLS], with dropout before and after it, and multiple choice by the same without the first dropout.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
from jax import Array

from ..checkpoints.tables import Entry, Table, linear_entries
from ..encoder import Encoder
from ..family import Architecture, EncoderConfig, Family
from ..heads.with_head import (
    EncoderParts,
    Form,
    WithHead,
    architectures,
    head_table,
    masked_words,
    masked_words_entries,
)
from ..layers.linear import Linear
from ..layers.segments import Rows, Segments, gather_positions, row_numbers
from .bert import Block, Embeddings
from .bert import encoder_entries as bert_entries


def _size(layers: int, width: int, embedding_size: int, generator_fraction: float | None = None) -> dict[str, Any]:
    """Return the fields of a size. All have heads of 64 and a feed-forward width of four times their own."""
    return {
        "layers": layers,
        "width": width,
        "heads": width // 64,
        "feed_forward": 4 * width,
        "embedding_size": embedding_size,
        "generator_fraction": generator_fraction,
    }


@dataclass(frozen=True)
class ElectraConfig(EncoderConfig):
    """Sizes and settings of an ELECTRA. The defaults are the reference implementation's, for keys that a file lacks."""

    MODEL_TYPE: ClassVar[str] = "electra"
    KEYS: ClassVar[Mapping[str, str]] = {
        **EncoderConfig.KEYS,
        "embedding_size": "embedding_size",
        "summary_dropout": "summary_last_dropout",
        "generator_fraction": "generator_hidden_size",
    }
    REQUIRED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **EncoderConfig.REQUIRED,
        "summary_type": ("first",),
        "summary_use_proj": (True,),
        "summary_activation": ("gelu",),
        "summary_first_dropout": (0, None),
    }
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # The two smallest sizes are BERT's (Turc et al. 2019): the paper has small, base and large.
        "electra-tiny": _size(2, 128, 64, 0.5),
        "electra-mini": _size(4, 256, 128, 0.25),
        "electra-small": _size(12, 256, 128, 0.25),
        "electra-base": _size(12, 768, 768, 1 / 3),
        "electra-large": _size(24, 1024, 1024, 0.25),
        # The generators that were released with them; that of electra-small is as wide as the discriminator.
        "electra-small-generator": _size(12, 256, 128),
        "electra-base-generator": _size(12, 256, 768),
        "electra-large-generator": _size(24, 256, 1024),
    }

    width: int = 256
    heads: int = 4
    feed_forward: int = 1024
    token_types: int = 2
    embedding_size: int = 128
    """size of the word, position and sentence vectors"""
    summary_dropout: float = 0.1
    """dropout rate of the inputs of a multiple-choice head"""
    generator_fraction: float | None = None
    """width of the generator, as a fraction of this network's; None: 1/4. Only `Pretraining` has both networks"""

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.generator_fraction
        if size is not None and not 0 < size <= 1:
            raise ValueError(
                "ElectraConfig: generator_hidden_size: expected a fraction of the discriminator's width, above 0 and "
                f"at most 1, found {size}"
            )
        if size is not None:
            self._generator_sizes()

    @property
    def table_width(self) -> int:
        """Size of the vectors of words, positions and token types."""
        return self.embedding_size

    @property
    def generator(self) -> "ElectraConfig":
        """Config of the generator: as many layers, heads of 64, four times its width in feed-forward (3.2)."""
        width, heads = self._generator_sizes()
        return dataclasses.replace(self, width=width, heads=heads, feed_forward=4 * width, generator_fraction=None)

    def _generator_sizes(self) -> tuple[int, int]:
        """Return the generator's width and number of heads."""
        width = round(self.width * (0.25 if self.generator_fraction is None else self.generator_fraction))
        heads = max(1, width // 64)
        if width % heads:
            raise ValueError(f"ElectraConfig: a generator of width {width} is not a multiple of its {heads} heads")
        return width, heads

    def head_dropout(self, head: str) -> float:
        """See `EncoderConfig.head_dropout`."""
        if head == "discriminator":
            return 0.0
        return self.summary_dropout if head == "choice" else super().head_dropout(head)

    def dropout_fields(self, rate: float) -> dict[str, float]:
        """See `EncoderConfig.dropout_fields`."""
        return {**super().dropout_fields(rate), "summary_dropout": rate}

    def to_json(self) -> dict[str, Any]:
        """See `FamilyConfig.to_json`."""
        stored = super().to_json()
        if self.generator_fraction is None:
            del stored["generator_hidden_size"]
        return stored


class Electra(Encoder):
    """The encoder of either network."""

    config: ElectraConfig  # pyright: ignore[reportIncompatibleVariableOverride] (modules are frozen)
    pooler: bool = False

    def setup(self) -> None:
        c = self.config
        self.embeddings = Embeddings(c)
        if c.embedding_size != c.width:
            self.project = Linear((c.width,), ("embed", "embed_out"), c.initializer, c.dtype)
        self.layers = Block(c)

    def enter(self, embedded: Array) -> Array:
        """Compute the input of the first layer [B, L, E] from the embeddings."""
        return embedded if self.config.embedding_size == self.config.width else self.project(embedded)


class Generator(Electra):
    """The generator of a pair: an encoder that is given its embeddings, and the masked language model head."""

    def setup(self) -> None:
        super().setup()
        self.mlm = masked_words(self.config, FORMS["masked_lm"])


class Logits(NamedTuple):
    """Logits of both networks, in the compute dtype."""

    mlm_logits: Array  # [B, P, V], or [B, L, V] if no positions were given
    replaced_logits: Array  # [B, L], above 0 for "replaced"


class Pretraining(nn.Module):
    """Both networks; the generator reads the discriminator's embeddings (3.1 and 3.2).

    What the generator predicts is drawn between the two calls, `model.apply(..., method="generate")` and
    `method="discriminate"`, whose arguments are those of the encoder. `separate` takes the networks apart again.
    """

    config: ElectraConfig

    def setup(self) -> None:
        self.generator = Generator(self.config.generator)
        self.discriminator = WithHead(self.config, "discriminator", FORMS["discriminator"], PARTS)

    def generate(
        self,
        input_ids: Array,
        segment_ids: Segments = None,
        position_ids: Array | None = None,
        token_type_ids: Array | None = None,
        *,
        mlm_positions: Array | None = None,
        rows: Rows | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Compute the generator's logits of masked words.

        Args:
            mlm_positions: [B, P] int32, the positions to predict; None for every position.

        Returns:
            logits [B, P, V] or [B, L, V].
        """
        rows = row_numbers(rows, input_ids)
        embeddings = self.discriminator.encoder.embeddings
        embedded = embeddings(input_ids, position_ids, token_type_ids, rows=rows, deterministic=deterministic)
        mode: Any = dict(cls_positions=None, rows=rows, deterministic=deterministic)
        hidden = self.generator.encode(embedded, segment_ids, position_ids, **mode).hidden
        hidden = hidden if mlm_positions is None else gather_positions(hidden, mlm_positions)
        return self.generator.mlm(hidden, embeddings.word)

    def discriminate(self, *inputs: Any, rows: Rows | None = None, deterministic: bool = True) -> Array:
        """Compute the discriminator's logits [B, L]; above 0, a token is taken for a replaced one."""
        return self.discriminator(*inputs, rows=rows, deterministic=deterministic)

    def __call__(self, *inputs: Any, mlm_positions: Array | None = None, **mode: Any) -> Logits:
        """Run both networks on the same tokens."""
        return Logits(self.generate(*inputs, mlm_positions=mlm_positions, **mode), self.discriminate(*inputs, **mode))


def separate(params: Mapping[str, Any]) -> tuple[Any, Any]:
    """Take the parameters of `Pretraining` apart.

    Returns:
        (those of the discriminator, the model with head "discriminator"; those of the generator, the model of
        `config.generator` with head "masked_lm")
    """
    generator = dict(params["generator"])
    words = generator.pop("mlm")
    embeddings = params["discriminator"]["encoder"]["embeddings"]
    return params["discriminator"], {"encoder": {**generator, "embeddings": embeddings}, "mlm": words}


def together(discriminator: Mapping[str, Any], generator: Mapping[str, Any]) -> dict[str, Any]:
    """Put the parameters of two networks together for `Pretraining`; the embeddings are the discriminator's.

    Args:
        discriminator: parameters of a model with head "discriminator".
        generator: parameters of a model with head "masked_lm".
    """
    encoder = {name: part for name, part in generator["encoder"].items() if name != "embeddings"}
    return {"discriminator": discriminator, "generator": {**encoder, "mlm": generator["mlm"]}}


def encoder_entries(c: ElectraConfig, prefix: str, path: tuple[str, ...], *, pooler: bool) -> list[Entry]:
    """Return the encoder's entries, with stored names under `prefix` and parameters at `path`; there is no pooler."""
    del pooler
    entries = bert_entries(c, prefix, path, pooler=False)
    if c.embedding_size != c.width:
        entries += linear_entries(f"{prefix}embeddings_project", (*path, "project"), (c.embedding_size,), (c.width,))
    return entries


PARTS = EncoderParts(Electra, encoder_entries, prefix="electra.", classes="Electra", pooler=False)
FORMS = {
    "discriminator": Form(
        transform="config", names=("discriminator_predictions.dense", "discriminator_predictions.dense_prediction")
    ),
    "masked_lm": Form(
        transform="gelu",
        names=(
            "generator_predictions.dense",
            "generator_predictions.LayerNorm",
            "generator_lm_head.bias",
            "generator_lm_head",
        ),
    ),
    "classification": Form(transform="gelu", drop_first=True, names=("classifier.dense", "classifier.out_proj")),
    "tokens": Form(),
    "span": Form(names=("qa_outputs",)),
    "choice": Form(transform="gelu", names=("sequence_summary.summary", "classifier")),
}


def _pretraining_table(c: ElectraConfig) -> Table:
    """Return the table of both networks, the generator's names under "generator."."""
    discriminator = head_table(PARTS, "discriminator", FORMS["discriminator"], c)
    words, _ = masked_words_entries(c.generator, FORMS["masked_lm"], PARTS)
    generator = [*encoder_entries(c.generator, PARTS.prefix, (), pooler=False), *words]
    return dataclasses.replace(
        discriminator,
        entries=(
            *(entry._replace(path=("discriminator", *entry.path)) for entry in discriminator.entries),
            *(
                entry._replace(name=f"generator.{entry.name}", path=("generator", *entry.path))
                for entry in generator
                if entry.path[0] != "embeddings"
            ),
        ),
    )


FAMILY = Family(
    config=ElectraConfig,
    title="ELECTRA",
    paper="Clark et al. 2020",
    tokenizers=("wordpiece",),
    architectures=architectures(
        PARTS, FORMS, [Architecture("ElectraForJointPreTraining", "pretraining", Pretraining, _pretraining_table)]
    ),
    objectives=("rtd", "mlm"),
    below=("embeddings", "project"),
)
