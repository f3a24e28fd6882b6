"""Task heads over any encoder: classification, multiple choice, tags (with or without a CRF), spans, masked words.

A decoder is an encoder here, and its head that predicts the next token is in causal_lm.py.

All families share one module per head. They differ only in the head's `Form`, which includes the names of its parts in
checkpoints.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn.initializers import Initializer

from ..checkpoints.tables import Entry, Table, linear_entries, norm_entries, same
from ..encoder import Encoded
from ..family import Architecture, EncoderConfig, StackConfig
from ..layers.activations import ACTIVATIONS
from ..layers.dropout import Dropout
from ..layers.linear import Embed, Linear, add_bias, partitioned
from ..layers.norms import LayerNorm
from ..layers.segments import Rows, Segments, gather_positions, row_numbers, rows_at, split_segments
from .causal_lm import CausalLanguageModel
from .crf import Crf, crf_entries
from .losses import SmoothedSums, projected_sums
from .pooling import pool


class Form(NamedTuple):
    """A family's version of a head: the layers between the encoder's hidden states and the logits."""

    pooler: bool = False
    """read the encoder's pooler instead of [CLS] itself"""
    transform: str | None = None
    """activation of a dense layer before the last one, "config" for the config's; None: no such layer, and for masked
    words the config's activation"""
    drop_first: bool = False
    """apply dropout before that layer too"""
    norm: bool = False
    """normalise its output"""
    bias: bool = True
    """that layer and the norm have biases"""
    last_bias: bool = True
    """the last layer has a bias"""
    names: tuple[str, ...] = ("classifier",)
    """stored names of the transform, the norm and the last layer, as far as they exist; for masked words: of the
    transform, the norm, the bias, and the decoder, which is tied to the embeddings; for next tokens: of the copy of
    the embeddings"""

    def activation(self, config: StackConfig) -> str:
        """Return the name of the transform's activation."""
        return config.activation if self.transform in (None, "config") else self.transform


def position_ids(config: EncoderConfig, prefix: str) -> dict[str, np.ndarray]:
    """Return the buffer of older checkpoints of BERT and its relatives: name -> value."""
    return {f"{prefix}embeddings.position_ids": np.arange(config.positions)[None]}


class EncoderParts(NamedTuple):
    """A family's encoder, as the heads need it."""

    build: Callable[..., nn.Module]  # (config, pooler=) -> the encoder; without `pooler=` if the family has none
    entries: Callable[..., list[Entry]]  # (config, prefix, path, pooler=) -> its entries, stored under the prefix
    prefix: str  # before the encoder's names in checkpoints of models with heads, such as "bert."
    classes: str  # start of the reference's class names, such as "Bert"
    pooler: bool = True  # whether the family has a pooler
    renamed: tuple[tuple[str, str], ...] = ()  # see `Table.renamed`
    buffers: Callable[..., dict[str, np.ndarray]] = position_ids  # (config, prefix) -> `Table.buffers`
    endings: tuple[tuple[str, str], ...] = ()  # (head, end of the class's name), where it is not that of `KINDS`

    def encoder(self, config: StackConfig, *, pooler: bool) -> Any:
        """Build the encoder."""
        return self.build(config, pooler=pooler) if self.pooler else self.build(config)

    def words(self, config: EncoderConfig) -> str:
        """Return the stored name of the word embeddings."""
        entries = self.entries(config, self.prefix, (), pooler=False)
        return next(entry.name for entry in entries if entry.path == ("embeddings", "word", "embedding"))

    def table(
        self,
        config: StackConfig,
        head: Sequence[Entry] = (),
        tied: Mapping[str, str] | None = None,
        *,
        pooler: bool,
        bare: bool = False,
    ) -> Table:
        """Return the table of the encoder with a head's entries.

        Args:
            config: config of the model.
            head: entries of the head.
            tied: see `Table.tied`.
            pooler: whether the model has a pooler.
            bare: return the table of the encoder alone, whose names have no prefix and whose parameters are at the
                root.
        """
        prefix, path = ("", ()) if bare else (self.prefix, ("encoder",))
        return Table(
            (*self.entries(config, prefix, path, pooler=pooler), *head),
            prefix=self.prefix,
            renamed=self.renamed,
            tied=tied or {},
            buffers=self.buffers(config, prefix),
        )


class WithHead(nn.Module):
    """An encoder with a task's head.

    `head` is one of
        classification  classes, or one number (regression), of whole examples (Devlin et al. 2018, 4.1)
        choice          a score for each of several continuations (4.4)
        tokens          classes of single tokens (5.3)
        crf             the same, with the parameters of a CRF over them
        span            scores of each token to be an answer's first and its last (4.2)
        discriminator   a score of each token to have been replaced (Clark et al. 2020, 2)
    """

    config: StackConfig
    head: str
    form: Form
    parts: EncoderParts

    def setup(self) -> None:
        c, form = self.config, self.form
        self.encoder = self.parts.encoder(c, pooler=form.pooler)
        linear = partial(Linear, kernel_init=c.initializer, dtype=c.dtype)
        if form.transform is not None:
            self.transform = linear((c.width,), ("embed", "embed_out"), use_bias=form.bias)
        if form.norm:
            self.norm = LayerNorm(c.norm_epsilon, c.dtype, form.bias)
        self.drop = Dropout(c.head_dropout(self.head))
        self.last = linear(
            (_outputs(c, self.head),),
            ("embed", "labels"),
            kernel_init=c.head_initializer,
            use_bias=form.last_bias,
            name=_last(self.head),
        )
        if self.head == "crf":
            self.chain = Crf(c.num_labels, name="crf")

    def __call__(
        self,
        inputs: Array,
        *more: Any,
        cls_positions: Array | None = None,
        rows: Rows | None = None,
        deterministic: bool = True,
    ) -> Any:
        """Compute the logits of one batch.

        Args:
            inputs: [B, ...], the encoder's first input.
            more: its other inputs, as returned by `encoder_inputs`.
            cls_positions: [B, X] int32, position of each example's [CLS]; None for only the row's first token. Only
                for heads over whole examples.
            rows: what determines, together with the "dropout" stream, what is dropped: [B] uint32, row numbers, or
                `ByExample` of the tokens; None numbers the rows from 0.
            deterministic: disable dropout.

        Returns:
            classification: [B, num_labels], or [B, X, num_labels] if cls_positions are given; choice: [B] or [B, X];
            tokens and crf: [B, L, num_labels], for a CRF its emissions; span: (start logits [B, L], end logits [B, L]);
            discriminator: [B, L].
        """
        form = self.form
        rows = row_numbers(rows, inputs)
        encode = partial(self.encoder, inputs, *more, rows=rows, deterministic=deterministic)
        if self.head == "crf":
            self.chain()  # creates the parameters; models.crf reads them from the tree, params["crf"]
        hidden: Any
        if self.head in ("classification", "choice"):
            if self.config.pooling != "cls":
                states = encode().hidden
                self.sow("intermediates", "states", states)  # for an auxiliary loss
                hidden = _pooled(states, more[0] if more else None, cls_positions, self.config.pooling)
            else:
                encoded: Encoded = encode(cls_positions=cls_positions, cls_only=True)
                hidden = encoded.pooled if form.pooler else encoded.first
            rows = rows_at(rows, jnp.zeros(len(inputs), jnp.int32) if cls_positions is None else cls_positions)
        elif cls_positions is not None:
            raise ValueError(f"a {self.head} head reads every token: it takes no cls_positions")
        else:
            hidden = encode().hidden
        drop = partial(self.drop, rows=rows, deterministic=deterministic)
        if form.transform is not None:
            hidden = drop(hidden) if form.drop_first else hidden
            hidden = ACTIVATIONS[form.activation(self.config)](self.transform(hidden))
        if form.norm:
            hidden = self.norm(hidden)
        logits = self.last(drop(hidden))
        if self.head in ("choice", "discriminator"):
            return logits[..., 0]
        return (logits[..., 0], logits[..., 1]) if self.head == "span" else logits

    def next_token_sums(self, states: Array, labels: Array, label_weights: Array) -> SmoothedSums:
        """Compute the losses of next tokens, see `CausalLanguageModel.loss`; of a decoder, as an auxiliary loss."""
        return projected_sums((states,), self.encoder.embeddings.word.embedding, labels, label_weights)


def _pooled(hidden: Array, segment_ids: Segments, cls_positions: Array | None, how: str) -> Array:
    """Pool the hidden states of each example: [B, X, E], or [B, E] if each row is one example."""
    segments = split_segments(segment_ids)[1]
    segments = jnp.ones(hidden.shape[:2], jnp.int32) if segments is None else segments
    if cls_positions is not None:
        return pool(hidden, segments, cls_positions, how)
    return pool(hidden, (segments > 0).astype(jnp.int32), jnp.zeros((len(hidden), 1), jnp.int32), how)[:, 0]


def _outputs(config: StackConfig, head: str) -> int:
    return {"choice": 1, "discriminator": 1, "span": 2}.get(head, config.num_labels)


def _last(head: str) -> str:
    """Return the name of a head's last layer in the parameter tree."""
    return "span" if head == "span" else "classifier"


class MaskedLanguageModelHead(nn.Module):
    """Dense layer, activation, norm, then products with the word embeddings, and a bias (Devlin et al. 2018, 3.1).

    The dense layer and the norm before the tied decoder are from the released code, not from the paper. Their size is
    that of the word embeddings.
    """

    activation: str
    norm_epsilon: float
    kernel_init: Initializer
    dtype: str = "float32"
    use_bias: bool = True

    @nn.compact
    def __call__(self, hidden: Array, words: Embed) -> Array:
        """Compute logits [..., V] from hidden states [..., E], in the compute dtype, accumulated in float32."""
        axes = ("embed", "embed_out")
        dense = Linear((words.width,), axes, self.kernel_init, self.dtype, self.use_bias, name="transform")
        norm = LayerNorm(self.norm_epsilon, self.dtype, self.use_bias, name="norm")
        hidden = norm(ACTIVATIONS[self.activation](dense(hidden)))
        bias = self.param("bias", partitioned(nn.initializers.zeros_init(), "vocab"), (words.count,), jnp.float32)
        return add_bias(words.attend(hidden), bias).astype(self.dtype)


def masked_words(config: EncoderConfig, form: Form) -> MaskedLanguageModelHead:
    """Build the head of a family that predicts masked words as BERT does."""
    activation = form.activation(config)
    return MaskedLanguageModelHead(activation, config.norm_epsilon, config.initializer, config.dtype, form.bias)


class MaskedLanguageModel(nn.Module):
    """An encoder, whose word embeddings are `embeddings.word`, with the masked language model head."""

    config: EncoderConfig
    form: Form
    parts: EncoderParts

    def setup(self) -> None:
        self.encoder = self.parts.encoder(self.config, pooler=self.form.pooler)
        self.mlm = masked_words(self.config, self.form)

    def __call__(
        self,
        inputs: Array,
        *more: Any,
        mlm_positions: Array | None = None,
        rows: Rows | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Compute the logits of masked words. Arguments as for `WithHead`, and these.

        Args:
            mlm_positions: [B, P] int32, the positions to predict; None for every position.

        Returns:
            logits [B, P, V] or [B, L, V], in the compute dtype.
        """
        hidden = self.hidden(inputs, *more, rows=rows, deterministic=deterministic)
        return self.words(hidden if mlm_positions is None else gather_positions(hidden, mlm_positions))

    def hidden(self, *inputs: Any, rows: Rows | None = None, deterministic: bool = True) -> Array:
        """Compute the encoder's hidden states [B, L, E]. Arguments as for the call."""
        return self.encoder(*inputs, rows=rows, deterministic=deterministic).hidden

    def words(self, hidden: Array) -> Array:
        """Compute logits [..., V] from hidden states [..., E], in the compute dtype.

        Of the parameters, only those of `words_parameters` are used.
        """
        return self.mlm(hidden, self.encoder.embeddings.word)


def words_parameters(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a `MaskedLanguageModel` that its `words` uses."""
    return {"mlm": params["mlm"], "encoder": {"embeddings": {"word": params["encoder"]["embeddings"]["word"]}}}


def encoder_inputs(config: Any, batch: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the positional arguments of a model, from a batch of named arrays: images, or rows of tokens [B, L].

    Inputs that the family does not use are left out: token types, if it has fewer than two. `features`, the states of
    each token by a frozen encoder, are there for models that read them.
    """
    if "pixel_values" in batch:
        return (batch["pixel_values"],)
    inputs = (batch["input_ids"], batch.get("segment_ids"), batch.get("position_ids"))
    if "features" in batch and getattr(config, "features", ()):
        return (*inputs, batch["features"])
    return (*inputs, batch.get("token_type_ids")) if config.token_types > 1 else inputs


def is_head_parameter(path: Sequence[str]) -> bool:
    """Tell whether a parameter of a model with a head is outside the encoder."""
    return path[0] != "encoder"


# --- a family's models ------------------------------------------------------------------------------------------------

DOUBLE = "DoubleHeadsModel"  # of the reference's models that choose and also predict next tokens

# Head -> end of the reference's class names.
KINDS = {
    "discriminator": "ForPreTraining",
    "masked_lm": "ForMaskedLM",
    "causal_lm": "ForCausalLM",
    "classification": "ForSequenceClassification",
    "tokens": "ForTokenClassification",
    "crf": "ForTokenClassification",
    "span": "ForQuestionAnswering",
    "choice": "ForMultipleChoice",
}


def architectures(
    parts: EncoderParts, forms: Mapping[str, Form], others: Sequence[Architecture] = ()
) -> tuple[Architecture, ...]:
    """Return all models of a family of encoders.

    Args:
        parts: the encoder.
        forms: head -> its form; "crf" uses that of "tokens".
        others: models with heads that only this family has.
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
        # Some released masked language models contain a pooler that is never used.
        for pooler in reversed(poolers) if head == "masked_lm" else (False,):
            if form is not None:
                form = form._replace(pooler=pooler or form.pooler)
                build = partial(_build, parts, head, form)
                name = parts.classes + dict(parts.endings).get(head, kind)
                found.append(Architecture(name, head, build, partial(head_table, parts, head, form)))
    return tuple(found)


def _build(parts: EncoderParts, head: str, form: Form, config: EncoderConfig) -> nn.Module:
    if head == "masked_lm":
        return MaskedLanguageModel(config, form, parts)
    if head == "causal_lm":
        return CausalLanguageModel(config, parts)
    return WithHead(config, head, form, parts)


def head_table(parts: EncoderParts, head: str, form: Form, config: EncoderConfig) -> Table:
    """Return the table of a model with one of the heads of `KINDS`."""
    if head == "masked_lm":
        return parts.table(config, *masked_words_entries(config, form, parts), pooler=form.pooler)
    if head == "causal_lm":
        return parts.table(config, (), next_tokens_tied(config, parts), pooler=False)
    width = (config.width,)
    names = iter(form.names)
    entries: list[Entry] = []
    if form.transform is not None:
        entries += linear_entries(next(names), ("transform",), width, width, bias=form.bias)
    if form.norm:
        entries += norm_entries(next(names), ("norm",), config.width, bias=form.bias)
    entries += linear_entries(next(names), (_last(head),), width, (_outputs(config, head),), bias=form.last_bias)
    if head == "crf":
        entries += crf_entries(config.num_labels)
    tied = next_tokens_tied(config, parts) if ("choice", DOUBLE) in parts.endings and head == "choice" else {}
    return parts.table(config, entries, tied, pooler=form.pooler)


def next_tokens_tied(config: EncoderConfig, parts: EncoderParts) -> dict[str, str]:
    """Return the stored copy of the word embeddings that predict next tokens: its name -> theirs."""
    return {"lm_head.weight": parts.words(config)}


def masked_words_entries(config: EncoderConfig, form: Form, parts: EncoderParts) -> tuple[list[Entry], dict[str, str]]:
    """Return (the entries of `masked_words` at "mlm", tied copy -> original)."""
    transform, norm, bias, decoder = form.names
    width = config.table_width
    entries = [
        *linear_entries(transform, ("mlm", "transform"), (config.width,), (width,), bias=form.bias),
        *norm_entries(norm, ("mlm", "norm"), width, bias=form.bias),
        Entry(bias, ("mlm", "bias"), same(config.vocab_size)),
    ]
    tied = {f"{decoder}.weight": parts.words(config), f"{decoder}.bias": bias}
    return entries, {copy: original for copy, original in tied.items() if copy != original}
