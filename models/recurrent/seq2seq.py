"""Recurrent encoder-decoders, with attention or without: translation before the Transformer.

    Sutskever et al. 2014, "Sequence to Sequence Learning with Neural Networks"            attention "none"
    Bahdanau et al. 2015, "Neural Machine Translation by Jointly Learning to Align and Translate"       "additive"
    Luong et al. 2015, "Effective Approaches to Attention-based Neural Machine Translation"   "dot", "general", "concat"

Additive attention comes before the cell: the state before a word chooses what of the source the cell reads with it.
Luong's comes after: the new state chooses, and input feeding gives the result to the next step's cell (3.3). Scores of
the state h and a word's memory m:

    additive    v . tanh(W h + U m)         dot    h . m         general    h . W m         concat    v . tanh(W [h; m])

How the decoder starts (`bridge`), by the names of its kinds:

    zero        zeros
    last        each layer from the encoder's layer of its number: its last states, both directions' side by side
    bridge      tanh(W h + b) of the last states of the encoder's last layer, every layer's hidden state and cell alike
    backward    the same of its backward states alone, which have just read the first word (Bahdanau et al. 2015, A.2.2)

Several pairs can share a row, as in the Transformer: states start anew with each segment, and attention stays within.
Positions are not read: a recurrent network has none.

New weights: cells within ±1/sqrt(E), embeddings normal with standard deviation 1/sqrt(width), other matrices Glorot's.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ..checkpoints.tables import Entry, Table, Transposed, linear_entries, same
from ..encoder_decoder import logits_bias_init
from ..family import Architecture, Family
from ..layers.dropout import Dropout
from ..layers.linear import Embed, add_bias
from ..layers.segments import Rows, Segments, row_numbers, split_segments
from ..two_vocabularies import WithTwoTables
from .config import RecurrentConfig
from .incremental import IncrementalRecurrent
from .network import Decoder, Encoder, Start, Step, decode
from .recurrence import State, cell_entries, multiply

# --- model ------------------------------------------------------------------------------------------------------------


class Recurrent(WithTwoTables):
    """Embeddings, encoder and decoder."""

    config: RecurrentConfig

    def setup(self) -> None:
        c = self.config
        draw = nn.initializers.normal(c.embedding_width**-0.5)
        table = partial(Embed, width=c.embedding_width, axis="vocab", embedding_init=draw, dtype=c.dtype)
        self.source = table(c.vocab_size, padding_id=c.pad_token_id)
        if c.tying != "all":
            self.target = table(c.target_words, padding_id=c.pad_token_id)
        if c.tying == "none":
            self.output = table(c.target_words)
        if c.logits_bias:
            self.final_logits_bias = self.param("final_logits_bias", logits_bias_init, (c.target_words,), jnp.float32)
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        self.drop = Dropout(c.dropout)

    def output_states(
        self,
        input_ids: Array,
        segment_ids: Segments,
        position_ids: Array | None,
        decoder_input_ids: Array,
        decoder_segment_ids: Segments,
        decoder_position_ids: Array | None,
        *,
        rows: Rows | None = None,
        deterministic: bool = True,
    ) -> Array:
        """See `EncoderDecoder.output_states`."""
        del position_ids, decoder_position_ids
        rows = row_numbers(rows, input_ids)
        source = split_segments(segment_ids)[1]
        source = jnp.ones_like(input_ids) if source is None else source
        target = split_segments(decoder_segment_ids)[0]
        target = jnp.ones_like(decoder_input_ids) if target is None else target
        embedded = self.drop(self.source(input_ids), rows, deterministic=deterministic)
        encoded = self.encoder(embedded, source, rows, deterministic=deterministic)
        words = self.drop(self._target_table(decoder_input_ids), rows, deterministic=deterministic)
        same_segment = target[:, :, None] == source[:, None, :]
        firsts = same_segment.argmax(axis=-1)
        lasts = source.shape[1] - 1 - same_segment[..., ::-1].argmax(axis=-1)
        start = self.decoder.start(encoded, source, firsts, lasts)
        return self.decoder(words, target, start, rows, deterministic=deterministic)

    def begin(self, input_ids: Array, segment_ids: Array) -> Start:
        """Read sources [B, S] with segments 1, or 0 for padding at their ends; the initial states are [B, E]."""
        encoded = self.encoder(self.source(input_ids), segment_ids, row_numbers(None, input_ids), deterministic=True)
        lasts = jnp.maximum((segment_ids > 0).sum(axis=1, dtype=jnp.int32) - 1, 0)[:, None]
        start = self.decoder.start(encoded, segment_ids, jnp.zeros_like(lasts), lasts)
        return start._replace(layers=jax.tree.map(lambda state: state[:, 0], start.layers))

    def read(self, start: Start, states: tuple[State, ...], fed: Array, tokens: Array) -> tuple[Array, Step]:
        """Read one more token of each of K hypotheses, for generation.

        Args:
            start: by `begin`.
            states: each layer's, each [B, K, E].
            fed: [B, K, F].
            tokens: [B, K] int32.

        Returns:
            (logits [B, K, V] float32, the decoder's new state)
        """
        words = self._target_table(tokens)
        product = multiply({**self.decoder.weights(), **self.decoder.memory(start)}, self.config.dtype)
        mask, constants = start.mask[:, None] > 0, self.decoder.constants(start)
        step = decode(self.config, product, states, fed, self.decoder.given(words), mask, [], constants)
        logits = self.output_table.attend(self.decoder.output(words, step.read))
        return (add_bias(logits, self.final_logits_bias) if self.config.logits_bias else logits), step

    @nn.nowrap
    def incremental(self) -> Any:
        """Return the model for incremental decoding, one token at a time."""
        return IncrementalRecurrent(self)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def recurrent_table(c: RecurrentConfig) -> Table:
    """Return the table of a model's parameters and their names in checkpoints."""
    wide, entries = c.embedding_width, []
    for name, words in (("source", c.vocab_size), ("target", c.target_words), ("output", c.target_words)):
        if name == "source" or c.tying == "none" or (name == "target" and c.tying == "decoder"):
            entries.append(Entry(f"{name}.weight", (name, "embedding"), same(words, wide)))
    if c.logits_bias:
        entries.append(Entry("output.bias", ("final_logits_bias",), same(c.target_words)))
    for layer in range(c.encoder_layers):
        inputs = c.memory_width if layer else wide
        for direction, suffix in (("forward", ""), ("backward", "_reverse")):
            if direction == "forward" or c.bidirectional:
                path = ("encoder", f"{direction}_{layer}")
                entries += cell_entries(c.cell, "encoder", f"l{layer}{suffix}", path, inputs, c.encoder_width)
    for layer in range(c.decoder_layers):
        inputs = c.width if layer else wide + c.fed_width
        entries += cell_entries(c.cell, "decoder", f"l{layer}", ("decoder", f"cells_{layer}"), inputs, c.width)

    def linear(name: str, inputs: int, outputs: int, *, bias: bool) -> list[Entry]:
        return linear_entries(f"decoder.{name}", ("decoder", name), (inputs,), (outputs,), bias=bias)

    def matrix(name: str, inputs: int, outputs: int) -> Entry:
        return Entry(f"decoder.{name}.weight", ("decoder", name, "kernel"), Transposed((inputs,), (outputs,)))

    if c.bridge in ("bridge", "backward"):
        entries += linear("bridge", c.memory_width if c.bridge == "bridge" else c.encoder_width, c.width, bias=True)
    if c.attention in ("additive", "concat"):
        entries.append(matrix("query", c.width, c.width))
        entries.append(matrix("score", c.width, 1))
    if c.attention not in ("none", "dot"):
        entries += linear("key", c.memory_width, c.width, bias=False)
    if c.output == "attentional":
        entries.append(matrix("combine", c.width + c.memory_width, wide))
    elif c.output == "maxout":
        entries += linear("maxout", c.width + wide + c.memory_width, 2 * wide, bias=True)
    elif c.width != wide:
        entries += linear("project", c.width, wide, bias=False)
    return Table(tuple(entries))


FAMILY = Family(
    config=RecurrentConfig,
    title="Recurrent seq2seq",
    paper="Bahdanau et al. 2015, Luong et al. 2015",
    architectures=(Architecture("RecurrentSeq2Seq", "generation", Recurrent, recurrent_table),),
    tokenizers=("unigram", "bpe", "word-bpe"),
    one_kind=True,
)
