"""The base of all encoder-decoders: two stacks of layers, the logits and losses of what they read, and single steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from .family import FamilyConfig
from .heads.losses import SmoothedSums, projected_sums
from .incremental import IncrementalEncoderDecoder
from .layers.linear import Embed, add_bias, partitioned
from .layers.segments import Rows, Segments, row_numbers, split_segments
from .layers.stack import run_layers

Side = Literal["encoder", "decoder"]

logits_bias_init = partitioned(nn.initializers.zeros_init(), "vocab")

# By their names in released checkpoints of encoder-decoders.
TOKEN_KEYS = {
    f"{token}_token_id": f"{token}_token_id"
    for token in ("pad", "eos", "bos", "decoder_start", "forced_bos", "forced_eos")
}


@dataclass(frozen=True)
class EncoderDecoderConfig(FamilyConfig):
    """Base of the encoder-decoders' configs, which also have `decoder_heads` and `head_size`, fields or properties."""

    REQUIRED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"is_encoder_decoder": (True,), "quantization_config": (None,)}
    WRITTEN_ANEW: ClassVar[tuple[str, ...]] = (*FamilyConfig.WRITTEN_ANEW, "is_encoder_decoder")

    vocab_size: int = 32_000
    """vocabulary size of the source, and of the target unless it has its own, V"""
    width: int = 512
    """size of the hidden states, E"""
    encoder_layers: int = 6
    """number of layers of the encoder"""
    decoder_layers: int = 6
    """number of layers of the decoder"""
    dropout: float = 0.1
    """dropout rate of embeddings and sub-layer outputs"""
    pad_token_id: int = 0
    """token of padding"""
    eos_token_id: int = 2
    """end-of-text token"""
    bos_token_id: int | None = None
    """beginning-of-text token, if the tokenizer has one"""
    decoder_start_token_id: int = 0
    """first token of the decoder's input"""
    forced_bos_token_id: int | None = None
    """token that every output begins with"""
    forced_eos_token_id: int | None = None
    """token that ends an output of maximum length"""

    @property
    def target_words(self) -> int:
        """Vocabulary size of the target."""
        return self.vocab_size

    @property
    def size_in_words(self) -> str:
        """Number of layers, to display."""
        return f"{self.encoder_layers}+{self.decoder_layers} layers"

    def dropout_fields(self, rate: float) -> dict[str, float]:
        """Return the fields to change for this dropout rate throughout the model."""
        return {"dropout": rate}

    def to_json(self) -> dict[str, Any]:
        """See `FamilyConfig.to_json`."""
        return super().to_json() | {"is_encoder_decoder": True}


class EncoderDecoder(nn.Module):
    """Encoder, decoder, and the products with the output embeddings that give the logits.

    A family's subclass creates, in its `setup`, the layers `encoder` and `decoder` and everything before and after
    them, and says by the methods of the first part how these are used.
    """

    config: Any

    # What a family says.

    def embed(self, side: Side, ids: Array, position_ids: Array | None, *, rows: Rows, deterministic: bool) -> Array:
        """Embed tokens [B, L] -> [B, L, E], the input of a side's first layer; `position_ids` None counts from 0."""
        raise NotImplementedError

    def layer_inputs(self, side: Side) -> tuple[Any, ...]:
        """Return what every layer of a side gets in addition to what all families' layers get."""
        del side
        return ()

    def step_inputs(self, positions: Array, slot_positions: Array) -> tuple[Any, ...]:
        """Return the same for the decoder's layers when they read one token of each beam.

        Args:
            positions: [B] int32, position of each row's tokens.
            slot_positions: [B, slots] int32, position of the token in each slot of the cache.
        """
        del positions, slot_positions
        return ()

    def leave(self, side: Side, hidden: Array, *, rows: Rows, deterministic: bool) -> Array:
        """Compute a side's output from its last layer's."""
        del side, rows, deterministic
        return hidden

    @property
    def output_table(self) -> Embed:
        """The output embeddings."""
        raise NotImplementedError

    def to_table(self, hidden: Array) -> Array:
        """Map the decoder's output to the states that are multiplied by the output embeddings."""
        return hidden

    def logits_bias(self) -> Array | None:
        """Return the constant of each word that is added to its logit, [V] float32, if there is one."""
        return None

    def decoder_block(self) -> nn.Module:
        """Return an unbound layer of the decoder."""
        raise NotImplementedError

    # What all of them do.

    def __call__(
        self,
        input_ids: Array,
        segment_ids: Segments = None,
        position_ids: Array | None = None,
        decoder_input_ids: Array | None = None,
        decoder_segment_ids: Segments = None,
        decoder_position_ids: Array | None = None,
        *,
        rows: Rows | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Compute the logits of each next word.

        Args:
            input_ids: [B, S] int32, the source.
            segment_ids: [B, S] int32, which pair of the row each token belongs to, 0 for padding; None for one pair
                that fills the row. A pair of arrays gives queries and keys their own.
            position_ids: [B, S] int32, position within the example; None counts from 0 along the row.
            decoder_input_ids: [B, T] int32, the start token and then the target without its last token. May be None
                only for initialisation.
            decoder_segment_ids: [B, T] int32, as for the source; None for segments of 1.
            decoder_position_ids: [B, T] int32, as for the source.
            rows: [B] uint32, row numbers, which together with the "dropout" stream determine what is dropped; None
                counts from 0.
            deterministic: disable dropout.

        Returns:
            [B, T, V] float32
        """
        states = self.output_states(
            input_ids,
            segment_ids,
            position_ids,
            self._decoder_input(input_ids, decoder_input_ids),
            decoder_segment_ids,
            decoder_position_ids,
            rows=rows,
            deterministic=deterministic,
        )
        logits, bias = self.output_table.attend(states), self.logits_bias()
        return logits if bias is None else add_bias(logits, jax.lax.stop_gradient(bias))

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
        """Compute the states that the output embeddings are multiplied by to give logits, [B, T, table width]."""
        mode: dict[str, Any] = {"rows": rows, "deterministic": deterministic}
        memory = self.encode(input_ids, segment_ids, position_ids, **mode)
        hidden = self.decode(memory, segment_ids, decoder_input_ids, decoder_segment_ids, decoder_position_ids, **mode)
        return self.to_table(hidden)

    def loss(
        self,
        passes: Sequence[Array],
        labels: Array,
        label_weights: Array | None = None,
        *,
        label_smoothing: float = 0.0,
        r_drop: float = 0.0,
        z_loss: float = 0.0,
    ) -> SmoothedSums:
        """Compute the losses without storing all logits, by `losses.projected_sums`.

        Args:
            passes: one or two [B, T, width of the table], by `output_states`; two with different dropout for R-Drop.
            labels: [B, T] int32, the target; `losses.IGNORED_LABEL` has weight 0.
            label_weights: [B, T], or None for ones.
            label_smoothing: fraction of the probability that is spread over all words.
            r_drop: weight of the divergence between two passes.
            z_loss: weight of the square of the logarithm of the softmax's denominator.
        """
        options = {"smoothing": label_smoothing, "bias": self.logits_bias(), "r_drop": r_drop, "z_loss": z_loss}
        return projected_sums(passes, self.output_table.embedding, labels, label_weights, **options)

    def encode(
        self,
        input_ids: Array,
        segment_ids: Segments = None,
        position_ids: Array | None = None,
        *,
        rows: Rows | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Compute the encoder's output [B, S, E]."""
        rows = row_numbers(rows, input_ids)
        return self._stack("encoder", input_ids, position_ids, (segment_ids,), rows, deterministic)

    def decode(
        self,
        memory: Array,
        segment_ids: Segments,
        decoder_input_ids: Array,
        decoder_segment_ids: Segments = None,
        decoder_position_ids: Array | None = None,
        *,
        rows: Rows | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Compute the decoder's output [B, T, E] from the encoder's, [B, S, E], and its `segment_ids`."""
        rows = row_numbers(rows, decoder_input_ids)
        cross = _cross_segments(decoder_input_ids, decoder_segment_ids, memory, segment_ids)
        given = (decoder_segment_ids, memory, cross)
        return self._stack("decoder", decoder_input_ids, decoder_position_ids, given, rows, deterministic)

    def last_scores(self, hidden: Array) -> Array:
        """Compute logits without their bias, [..., V] float32, from the last decoder layer's output [..., E]."""
        left = self.leave("decoder", hidden, rows=row_numbers(None, hidden), deterministic=True)
        return self.output_table.attend(self.to_table(left))

    def embed_step(self, tokens: Array, positions: Array) -> Array:
        """Embed target tokens [B, K] at their row's position [B] -> [B, K, E]."""
        at = jnp.broadcast_to(positions[:, None], tokens.shape)
        return self.embed("decoder", tokens, at, rows=row_numbers(None, tokens), deterministic=True)

    @nn.nowrap
    def incremental(self) -> IncrementalEncoderDecoder:
        """Return the model for incremental decoding, one token at a time."""
        return IncrementalEncoderDecoder(self, self.decoder_block())

    def _stack(
        self,
        side: Side,
        ids: Array,
        position_ids: Array | None,
        given: tuple[Any, ...],
        rows: Rows,
        deterministic: bool,
    ) -> Array:
        """Read tokens with the layers of a side, which get `given` first."""
        c = self.config
        mode: dict[str, Any] = {"rows": rows, "deterministic": deterministic}
        hidden, _ = run_layers(
            getattr(self, side),
            self.embed(side, ids, position_ids, **mode),
            *given,
            rows,
            *self.layer_inputs(side),
            count=getattr(c, f"{side}_layers"),
            scan=c.scan_layers,
            remat=c.remat,
            deterministic=deterministic,
        )
        return self.leave(side, hidden, **mode)

    def _decoder_input(self, input_ids: Array, decoder_input_ids: Array | None) -> Array:
        if decoder_input_ids is not None:
            return decoder_input_ids
        if self.is_initializing():
            return input_ids
        raise ValueError("decoder_input_ids: expected int [B, T], found None")


def _cross_segments(
    decoder_input_ids: Array, decoder_segment_ids: Segments, memory: Array, source: Segments
) -> Segments:
    """Return (segments of the decoder's tokens, segments of the encoder's), if either is given."""
    query_segments, key_segments = split_segments(decoder_segment_ids)[0], split_segments(source)[1]
    if query_segments is None and key_segments is None:
        return None
    if query_segments is None:
        query_segments = jnp.ones(decoder_input_ids.shape, jnp.int32)
    if key_segments is None:
        key_segments = jnp.ones(memory.shape[:2], jnp.int32)
    return query_segments, key_segments
