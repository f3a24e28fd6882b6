"""Task heads over any encoder: classification, multiple choice, tags (with a CRF or without), spans, masked words.

A head is one module for all families. What differs from family to family is a `Form` a head, and the names that the
parts have in checkpoints.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn.initializers import Initializer

from .checkpoints.tables import Entry, Table, linear_entries, norm_entries, same
from .crf import Crf, crf_entries
from .encoder import Encoded
from .family import Architecture, EncoderConfig
from .layers import (
    ACTIVATIONS,
    Dropout,
    Embed,
    LayerNorm,
    Linear,
    add_bias,
    gather_positions,
    partitioned,
    row_numbers,
)


class Form(NamedTuple):
    """How a family goes from an encoder's hidden states to one kind of logits."""

    pooler: bool = False
    """from the encoder's pooler, instead of from [CLS] itself"""
    transform: str | None = None
    """activation of a dense layer before the last one"""
    drop_first: bool = False
    """dropout before that layer too"""
    norm: bool = False
    """a norm after it"""
    names: tuple[str, ...] = ("classifier",)
    """stored names of the transform, of the norm and of the last layer, as many of them as there are; of masked words:
    of the transform, of the norm, of the bias, and of the decoder, which is tied to the embeddings"""


class EncoderParts(NamedTuple):
    """What a family's heads stand on."""

    build: Callable[..., nn.Module]  # (config, pooler=) -> the encoder; without `pooler` where there is none
    entries: Callable[..., list[Entry]]  # (config, prefix, path, pooler=) -> its entries, stored under the prefix
    prefix: str  # before the encoder's names in the checkpoint of a model with a head, as "bert."
    classes: str  # before the kind in the reference's names of models, as "Bert"
    pooler: bool = True  # whether the family has one
    renamed: tuple[tuple[str, str], ...] = ()  # as `Table.renamed`

    def encoder(self, config: EncoderConfig, *, pooler: bool) -> Any:
        """The encoder's module."""
        return self.build(config, pooler=pooler) if self.pooler else self.build(config)

    def table(
        self,
        config: EncoderConfig,
        head: Sequence[Entry] = (),
        tied: Mapping[str, str] | None = None,
        *,
        pooler: bool,
        bare: bool = False,
    ) -> Table:
        """The table of the encoder with a head's entries.

        Args:
            config: the model's.
            head: the head's entries.
            tied: as `Table.tied`.
            pooler: whether the model has one.
            bare: of the encoder alone, whose names have no prefix and whose parameters lie at the root.
        """
        prefix, path = ("", ()) if bare else (self.prefix, ("encoder",))
        return Table(
            (*self.entries(config, prefix, path, pooler=pooler), *head),
            prefix=self.prefix,
            renamed=self.renamed,
            tied=tied or {},
            buffers={f"{prefix}embeddings.position_ids": np.arange(config.positions)[None]},
        )


class WithHead(nn.Module):
    """An encoder with a task's head.

    `head` is one of
        classification  classes, or one number (regression), of whole examples (Devlin et al. 2018, 4.1)
        choice          a score for each of several continuations (4.4)
        tokens          classes of single tokens (5.3)
        crf             the same, with the parameters of a CRF over them
        span            scores of each token to be an answer's first and its last (4.2)
    """

    config: EncoderConfig
    head: str
    form: Form
    parts: EncoderParts

    def setup(self) -> None:
        c, form = self.config, self.form
        self.encoder = self.parts.encoder(c, pooler=form.pooler)
        linear = partial(Linear, kernel_init=c.initializer, dtype=c.dtype)
        if form.transform is not None:
            self.transform = linear((c.width,), ("embed", "embed_out"))
        if form.norm:
            self.norm = LayerNorm(c.norm_epsilon, c.dtype)
        self.drop = Dropout(c.head_dropout(self.head))
        self.last = linear((_outputs(c, self.head),), ("embed", "labels"), name=_last(self.head))
        if self.head == "crf":
            self.chain = Crf(c.num_labels, name="crf")

    def __call__(
        self,
        inputs: Array,
        *more: Any,
        cls_positions: Array | None = None,
        rows: Array | None = None,
        deterministic: bool = True,
    ) -> Any:
        """The logits of one batch.

        Args:
            inputs: [B, ...], the encoder's first input.
            more: its other inputs, as `encoder_inputs` gives them.
            cls_positions: [B, X] int32, where each example's [CLS] stands; None for the row's first token alone. Only
                for heads over whole examples.
            rows: [B] uint32, the rows' numbers, which with the stream "dropout" decide what is dropped; None counts
                from 0.
            deterministic: no dropout.

        Returns:
            classification: [B, num_labels], or [B, X, num_labels] where cls_positions are given; choice: [B] or [B, X];
            tokens and crf: [B, L, num_labels], a CRF's emissions; span: (start logits [B, L], end logits [B, L]).
        """
        form = self.form
        rows = row_numbers(rows, inputs)
        drop = partial(self.drop, rows=rows, deterministic=deterministic)
        encode = partial(self.encoder, inputs, *more, rows=rows, deterministic=deterministic)
        if self.head == "crf":
            self.chain()  # makes the parameters; models.crf reads them from the tree, params["crf"]
        hidden: Any
        if self.head in ("classification", "choice"):
            encoded: Encoded = encode(cls_positions=cls_positions, cls_only=True)
            hidden = encoded.pooled if form.pooler else encoded.first
        elif cls_positions is not None:
            raise ValueError(f"a {self.head} head reads every token: it takes no cls_positions")
        else:
            hidden = encode().hidden
        if form.transform is not None:
            hidden = drop(hidden) if form.drop_first else hidden
            hidden = ACTIVATIONS[form.transform](self.transform(hidden))
        if form.norm:
            hidden = self.norm(hidden)
        logits = self.last(drop(hidden))
        if self.head == "choice":
            return logits[..., 0]
        return (logits[..., 0], logits[..., 1]) if self.head == "span" else logits


def _outputs(config: EncoderConfig, head: str) -> int:
    return {"choice": 1, "span": 2}.get(head, config.num_labels)


def _last(head: str) -> str:
    """What a head's last layer is called in the parameter tree."""
    return "span" if head == "span" else "classifier"


class MaskedLanguageModelHead(nn.Module):
    """Dense, activation, norm, then the products with the word embeddings, and a bias (Devlin et al. 2018, 3.1).

    The dense layer and the norm before the tied decoder are of the released code, not of the paper.
    """

    activation: str
    norm_epsilon: float
    kernel_init: Initializer
    dtype: str = "float32"

    @nn.compact
    def __call__(self, hidden: Array, words: Embed) -> Array:
        """hidden [..., E] -> logits [..., V] in the compute dtype, accumulated in float32."""
        hidden = Linear(
            hidden.shape[-1:], ("embed", "embed_out"), kernel_init=self.kernel_init, dtype=self.dtype, name="transform"
        )(hidden)
        hidden = LayerNorm(self.norm_epsilon, dtype=self.dtype, name="norm")(ACTIVATIONS[self.activation](hidden))
        bias = self.param("bias", partitioned(nn.initializers.zeros_init(), "vocab"), (words.count,), jnp.float32)
        return add_bias(words.attend(hidden), bias).astype(self.dtype)


def masked_words(config: EncoderConfig) -> MaskedLanguageModelHead:
    """The head of a family whose masked words are predicted as BERT's are."""
    return MaskedLanguageModelHead(config.activation, config.norm_epsilon, config.initializer, config.dtype)


class MaskedLanguageModel(nn.Module):
    """An encoder, whose table of words is `embeddings.word`, and the masked language model head."""

    config: EncoderConfig
    parts: EncoderParts
    pooler: bool = False

    def setup(self) -> None:
        self.encoder = self.parts.encoder(self.config, pooler=self.pooler)
        self.mlm = masked_words(self.config)

    def __call__(
        self,
        inputs: Array,
        *more: Any,
        mlm_positions: Array | None = None,
        rows: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """As `WithHead`, and mlm_positions [B, P] int32, where words are predicted; None for every position.

        Returns:
            logits [B, P, V] or [B, L, V], in the compute dtype.
        """
        hidden = self.encoder(inputs, *more, rows=rows, deterministic=deterministic).hidden
        hidden = hidden if mlm_positions is None else gather_positions(hidden, mlm_positions)
        return self.mlm(hidden, self.encoder.embeddings.word)


def encoder_inputs(config: EncoderConfig, batch: Mapping[str, Any]) -> tuple[Any, ...]:
    """The positional arguments of a model that reads tokens, from a batch of arrays [B, L] by their names.

    What the family has no use for is left out: token types where there are not two to tell apart.
    """
    inputs = (batch["input_ids"], batch.get("segment_ids"), batch.get("position_ids"))
    return (*inputs, batch.get("token_type_ids")) if config.token_types > 1 else inputs


def is_head_parameter(path: Sequence[str]) -> bool:
    """Whether a parameter of a model with a head lies outside of its encoder."""
    return path[0] != "encoder"


# --- a family's models ------------------------------------------------------------------------------------------------

# Head -> what the reference's names of models end in.
KINDS = {
    "masked_lm": "ForMaskedLM",
    "classification": "ForSequenceClassification",
    "tokens": "ForTokenClassification",
    "crf": "ForTokenClassification",
    "span": "ForQuestionAnswering",
    "choice": "ForMultipleChoice",
}


def architectures(
    parts: EncoderParts, forms: Mapping[str, Form], others: Sequence[Architecture] = ()
) -> tuple[Architecture, ...]:
    """All models of a family of encoders.

    Args:
        parts: its encoder.
        forms: head -> its form; "crf" has that of "tokens".
        others: models with heads of the family's own.
    """
    poolers = (True, False) if parts.pooler else (False,)
    found = [
        Architecture(
            f"{parts.classes}Model",
            "encoder",
            partial(parts.encoder, pooler=pooler),
            partial(parts.table, pooler=pooler, bare=True),
        )
        for pooler in poolers
    ]
    found += others
    for head, kind in KINDS.items():
        form = forms.get("tokens" if head == "crf" else head)
        # Some released masked language models hold a pooler that nothing reads.
        for pooler in reversed(poolers) if head == "masked_lm" else (False,):
            if form is not None:
                form = form._replace(pooler=pooler or form.pooler)
                build = partial(_build, parts, head, form)
                found.append(Architecture(f"{parts.classes}{kind}", head, build, partial(_table, parts, head, form)))
    return tuple(found)


def _build(parts: EncoderParts, head: str, form: Form, config: EncoderConfig) -> nn.Module:
    if head == "masked_lm":
        return MaskedLanguageModel(config, parts, form.pooler)
    return WithHead(config, head, form, parts)


def _table(parts: EncoderParts, head: str, form: Form, config: EncoderConfig) -> Table:
    if head == "masked_lm":
        return parts.table(config, *masked_words_entries(config, form, parts.prefix), pooler=form.pooler)
    width = (config.width,)
    names = iter(form.names)
    entries: list[Entry] = []
    if form.transform is not None:
        entries += linear_entries(next(names), ("transform",), width, width)
    if form.norm:
        entries += norm_entries(next(names), ("norm",), config.width)
    entries += linear_entries(next(names), (_last(head),), width, (_outputs(config, head),))
    if head == "crf":
        entries += crf_entries(config.num_labels)
    return parts.table(config, entries, pooler=form.pooler)


def masked_words_entries(config: EncoderConfig, form: Form, prefix: str) -> tuple[list[Entry], dict[str, str]]:
    """(the entries of `masked_words` at "mlm", the copies that are tied to others)."""
    transform, norm, bias, decoder = form.names
    entries = [
        *linear_entries(transform, ("mlm", "transform"), (config.width,), (config.width,)),
        *norm_entries(norm, ("mlm", "norm"), config.width),
        Entry(bias, ("mlm", "bias"), same(config.vocab_size)),
    ]
    tied = {f"{decoder}.weight": f"{prefix}embeddings.word_embeddings.weight", f"{decoder}.bias": bias}
    return entries, {copy: original for copy, original in tied.items() if copy != original}
