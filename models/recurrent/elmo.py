"""ELMo: a bidirectional language model over words that are read as characters.

Peters et al. 2018, "Deep contextualized word representations"; what the paper leaves open is as in allenai/bilm-tf.

A word's UTF-8 bytes go through convolutions of several widths, the maximum over places, ReLU, highway layers and a
linear map (Jozefowicz et al. 2016). Two stacks of LSTM layers, one from each end, read the words; a cell's output is
projected to the width of a word, and cells and projections are clipped. From the second layer on, a layer's input is
added to its output. The state is carried from one batch of rows to the next, and is not reset at sentence ends.

    ids = character_ids([["<S>", "A", "dog", "</S>"]])
    layers, state = model.apply({"params": params}, ids)      # [B, N + 1, L, 2 E]: the words, then each layer's

A task learns what of each layer it takes (equation 1) by `heads.pooling.mix`, as `bestiary probe --mix` does.

bilm-tf's own files are read by `bilm_tf.read_bilm`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..checkpoints.tables import Entry, Table, linear_entries, same
from ..family import Architecture, Family, FamilyConfig
from ..heads.losses import SmoothedSums, projected_sums
from ..layers.dropout import Dropout
from ..layers.linear import Embed, Linear, add_bias, matmul
from ..layers.segments import Rows, row_numbers
from .recurrence import Matrix, Product, loop, uniform

# Characters are bytes, moved by one: 0 is no word at all, and masks it.
SENTENCE_START, SENTENCE_END, WORD_START, WORD_END, NO_CHARACTER = 257, 258, 259, 260, 261
CHARACTERS = 262
SPECIAL = {"<S>": SENTENCE_START, "</S>": SENTENCE_END}

State = tuple[tuple[tuple[Array, Array], ...], ...]
"""Of each direction, of each layer: (output [B, E], cell [B, C]), float32."""


@dataclass(frozen=True)
class ElmoConfig(FamilyConfig):
    """Sizes and settings. The defaults are those of the paper's model."""

    MODEL_TYPE: ClassVar[str] = "elmo"
    SIZES: ClassVar[tuple[str, ...]] = (
        *("vocab_size", "character_width", "filters", "highways", "most_characters", "width", "cells", "layers"),
        *("cell_clip", "projection_clip", "residual", "dropout", "pad_token_id"),
    )
    KEYS: ClassVar[Mapping[str, str]] = {name: name for name in SIZES}
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "elmo-original": {},
        # For small corpora.
        "elmo-small": dict(
            **dict(filters=(1, 16, 2, 16, 3, 32), highways=1, width=64, cells=256, most_characters=24),
            **dict(vocab_size=10_000),
        ),
    }

    vocab_size: int = 793_471
    """number of words that are predicted, V; any word is read"""
    character_width: int = 16
    """size of the vectors of characters"""
    filters: tuple[int, ...] = (1, 32, 2, 32, 3, 64, 4, 128, 5, 256, 6, 512, 7, 1024)
    """width and number of each convolution's filters"""
    highways: int = 2
    """number of highway layers"""
    most_characters: int = 50
    """places for a word's bytes, with its marks of start and end; longer words are cut"""
    width: int = 512
    """size of a word's vector and of each direction's output, E"""
    cells: int = 4096
    """size of an LSTM's cell, C"""
    layers: int = 2
    """number of LSTM layers in each direction, N"""
    cell_clip: float = 3.0
    """greatest absolute value of a cell"""
    projection_clip: float = 3.0
    """greatest absolute value of a layer's projected output"""
    residual: bool = True
    """add a layer's input to its output, from the second layer on"""
    dropout: float = 0.1
    """dropout rate of words and of each layer's output"""
    pad_token_id: int = 0
    """token of padding, which is not read"""

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if len(self.filters) % 2 or not self.filters or min(self.filters) < 1:
            raise ValueError(f"{name}: filters are pairs of a width and a number, not {list(self.filters)}")
        if max(self.filters[::2]) > self.most_characters:
            raise ValueError(f"{name}: a filter is wider than a word's {self.most_characters} characters")
        if self.remat or self.attention_implementation is not None or self.dtype != "float32":
            raise ValueError(f"{name}: computes in float32, without remat and without an attention backend")

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(width, number) of the convolutions' filters."""
        return list(zip(self.filters[::2], self.filters[1::2], strict=True))

    @property
    def size_in_words(self) -> str:
        """Number of layers, to display."""
        return f"{self.layers} layers in both directions"

    def dropout_fields(self, rate: float) -> dict[str, float]:
        """Return the fields to change for this dropout rate throughout the model."""
        return {"dropout": rate}

    @classmethod
    def vocabulary_fields(cls, size: int, ids: Mapping[str, int]) -> dict[str, Any]:
        """Return the fields of a new model that its tokenizer decides; see `EncoderConfig.vocabulary_fields`."""
        return {"vocab_size": size, "pad_token_id": ids.get("pad", 0)}


def character_ids(sentences: Sequence[Sequence[str]], most: int = 50) -> np.ndarray:
    """Return the characters of words, [B, L, most] int32; zeros after the end of a shorter sentence.

    Args:
        sentences: words of each; "<S>" and "</S>" are the marks of a sentence's start and end.
        most: places of a word; a longer one is cut.

    Raises:
        ValueError: a word is empty.
    """
    length = max(map(len, sentences), default=0)
    found = np.zeros((len(sentences), length, most), np.int32)
    for row, words in zip(found, sentences, strict=True):
        for place, word in zip(row, words, strict=False):
            if not word:
                raise ValueError("character_ids: a word is empty; leave it out")
            special = SPECIAL.get(word)
            ids = [byte + 1 for byte in word.encode()[: most - 2]] if special is None else [special]
            place[:] = NO_CHARACTER
            place[: len(ids) + 2] = [WORD_START, *ids, WORD_END]
    return found


class CharacterEncoder(nn.Module):
    """Words from their characters: [..., most] int32 -> [..., E] float32."""

    config: ElmoConfig

    @nn.compact
    def __call__(self, characters: Array) -> Array:
        c = self.config
        table = Embed(CHARACTERS - 1, c.character_width, "vocab", uniform(1.0), name="characters")
        # Padding's vector is zero; it is not stored.
        vectors = jnp.where((characters > 0)[..., None], table(jnp.maximum(characters - 1, 0)), 0.0)
        vectors = vectors.reshape(-1, *vectors.shape[-2:])
        pooled = []
        for number, (width, count) in enumerate(c.pairs):
            inputs = width * c.character_width
            start, zeros = nn.initializers.normal(inputs**-0.5), nn.initializers.zeros_init()
            linear = Matrix(inputs, count, start, use_bias=True, bias_init=zeros, name=f"filter_{number}")
            places = vectors.shape[1] - width + 1
            windows = jnp.concatenate([vectors[:, at : at + places] for at in range(width)], axis=-1)
            found = matmul(windows, linear(), 0, "float32", "float32")
            pooled.append(jax.nn.relu(add_bias(found.max(axis=1), linear.bias)))
        words = jnp.concatenate(pooled, axis=-1)
        size, glorot = words.shape[-1], nn.initializers.glorot_uniform()
        for number in range(c.highways):
            # New gates are nearly closed, as in the authors' code.
            halves = []
            for name, bias in (("gate", -2.0), ("change", 0.0)):
                start = nn.initializers.constant(bias)
                linear = Matrix(size, size, glorot, use_bias=True, bias_init=start, name=f"{name}_{number}")
                halves.append(add_bias(matmul(words, linear(), 0, "float32", "float32"), linear.bias))
            gate = jax.nn.sigmoid(halves[0])
            words = gate * jax.nn.relu(halves[1]) + (1 - gate) * words
        words = Linear((c.width,), ("embed", "embed_out"), glorot, name="project")(words)
        return words.reshape(*characters.shape[:-1], c.width)


def _step(clips: tuple[float, float], product: Product, carry: Any, x: Any, constants: Any) -> tuple[Any, Array]:
    """Read one word of each row; a row without one keeps its state."""
    del constants
    given, there = x
    output, cell = carry
    enter, forget, candidate, leave = jnp.split(given + product("state", output), 4, axis=-1)
    kept = jax.nn.sigmoid(forget + 1.0) * cell + jax.nn.sigmoid(enter) * jnp.tanh(candidate)
    kept = jnp.clip(kept, -clips[0], clips[0])
    projected = product("project", jax.nn.sigmoid(leave) * jnp.tanh(kept))
    projected = jnp.clip(projected, -clips[1], clips[1])
    there = there[:, None]
    carry = jnp.where(there, projected, output), jnp.where(there, kept, cell)
    return carry, jnp.where(there, projected, 0.0)


class ProjectedLstm(nn.Module):
    """An LSTM layer of one direction, whose output is projected, with TensorFlow's forget bias of 1."""

    config: ElmoConfig

    def setup(self) -> None:
        c = self.config
        draw = uniform(c.width**-0.5)
        self.input = Matrix(c.width, 4 * c.cells, draw, use_bias=True)
        self.state = Matrix(c.width, 4 * c.cells, draw)
        self.project = Matrix(c.cells, c.width, uniform(c.cells**-0.5))

    def __call__(self, inputs: Array, there: Array, state: Any, *, reverse: bool) -> tuple[Any, Array]:
        """Read [B, L, E] where `there` [B, L] is true; return (state, outputs [B, L, E])."""
        given = matmul(jnp.moveaxis(inputs, 1, 0), self.input.kernel, 0, "float32", "float32")
        weights = {"state": self.state(), "project": self.project()}
        clips = (self.config.cell_clip, self.config.projection_clip)
        xs = (add_bias(given, self.input.bias), there.T)
        state, outputs = loop(partial(_step, clips), weights, state, xs, (), reverse)
        return state, jnp.moveaxis(outputs, 0, 1)


class Elmo(nn.Module):
    """The bidirectional language model, without its softmax."""

    config: ElmoConfig

    def setup(self) -> None:
        c = self.config
        self.words = CharacterEncoder(c)
        self.ahead = [ProjectedLstm(c) for _ in range(c.layers)]
        self.back = [ProjectedLstm(c) for _ in range(c.layers)]
        self.drop = Dropout(c.dropout)

    def start(self, rows: int) -> State:
        """Return the state before anything was read."""
        c = self.config
        layer = (jnp.zeros((rows, c.width)), jnp.zeros((rows, c.cells)))
        return ((layer,) * c.layers,) * 2

    def __call__(
        self,
        characters: Array,
        state: State | None = None,
        *,
        rows: Rows | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, State]:
        """Read rows of words.

        Args:
            characters: [B, L, most] int32, by `character_ids`; zeros after a row's words.
            state: that of the rows before, or None for new text. The direction from right to left goes on from the
                rows before, too, as in bilm-tf.
            rows: [B] uint32, row numbers, which determine what is dropped; None counts from 0.
            deterministic: disable dropout.

        Returns:
            ([B, N + 1, L, 2 E] float32: words, twice, and each layer's outputs from left to right and from right to
            left, zero after a row's words; the state)
        """
        there = (characters > 0).any(axis=-1)
        words = jnp.where(there[..., None], self.words(characters), 0.0)
        drop = partial(self.drop, rows=row_numbers(rows, characters), deterministic=deterministic)
        words = drop(words)
        state = self.start(len(characters)) if state is None else state
        found, after = [], []
        for stack, before, reverse in zip((self.ahead, self.back), state, (False, True), strict=True):
            hidden, outputs, states = words, [words], []
            for number, (layer, old) in enumerate(zip(stack, before, strict=True)):
                new, output = layer(hidden, there, old, reverse=reverse)
                output = drop(output)
                hidden = hidden + output if number and self.config.residual else output
                outputs.append(hidden)
                states.append(new)
            found.append(outputs)
            after.append(tuple(states))
        layers = [jnp.concatenate(both, axis=-1) for both in zip(*found, strict=True)]
        return jnp.stack(layers, axis=1), tuple(after)


class BidirectionalLM(nn.Module):
    """ELMo with its softmax, whose weights both directions share."""

    config: ElmoConfig

    def setup(self) -> None:
        c = self.config
        self.encoder = Elmo(c)
        draw, zeros = nn.initializers.normal(c.width**-0.5), nn.initializers.zeros_init()
        self.output = Matrix(c.width, c.vocab_size, draw, use_bias=True, bias_init=zeros)

    def __call__(self, characters: Array) -> Array:
        """Compute the logits of the next word and of the word before: [B, L, most] int32 -> [B, 2, L, V] float32."""
        layers, _ = self.encoder(characters)
        both = jnp.stack(jnp.split(layers[:, -1], 2, axis=-1), axis=1)
        return add_bias(matmul(both, self.output(), 0, "float32", "float32"), self.output.bias)

    def start(self, rows: int) -> State:
        """See `Elmo.start`."""
        return self.encoder.start(rows)

    def losses(
        self, characters: Array, state: State, labels: tuple[Array, Array], weights: tuple[Array, Array], **mode: Any
    ) -> tuple[tuple[SmoothedSums, SmoothedSums], State]:
        """Compute the losses of both directions without storing all logits; `mode` as for `Elmo`.

        Args:
            characters: [B, L, most] int32.
            state: that of the rows before.
            labels: the next words and the words before, each [B, L] int32.
            weights: [B, L] float32 each.
        """
        layers, state = self.encoder(characters, state, **mode)
        # The bias is the weight of a state that is always one.
        table = jnp.concatenate([self.output(), self.output.bias[None]], axis=0).T
        found = []
        for hidden, label, weight in zip(jnp.split(layers[:, -1], 2, axis=-1), labels, weights, strict=True):
            one = jnp.ones((*hidden.shape[:2], 1))
            found.append(projected_sums([jnp.concatenate([hidden, one], axis=-1)], table, label, weight))
        return (found[0], found[1]), state


# --- checkpoints ------------------------------------------------------------------------------------------------------


def elmo_table(c: ElmoConfig) -> Table:
    """Return the table of a `BidirectionalLM`'s parameters and their names in checkpoints."""
    words, size = ("encoder", "words"), sum(count for _, count in c.pairs)
    table = ("encoder", "words", "characters", "embedding")
    entries = [Entry("words.characters.weight", table, same(CHARACTERS - 1, c.character_width))]
    for number, (width, count) in enumerate(c.pairs):
        inputs = (width * c.character_width,)
        entries += linear_entries(f"words.filters.{number}", (*words, f"filter_{number}"), inputs, (count,))
    for number in range(c.highways):
        for name in ("gate", "change"):
            at = (*words, f"{name}_{number}")
            entries += linear_entries(f"words.highways.{number}.{name}", at, (size,), (size,))
    entries += linear_entries("words.project", (*words, "project"), (size,), (c.width,))
    for name in ("ahead", "back"):
        for layer in range(c.layers):
            at, stored = ("encoder", f"{name}_{layer}"), f"{name}.{layer}"
            entries += linear_entries(f"{stored}.input", (*at, "input"), (c.width,), (4 * c.cells,))
            entries += linear_entries(f"{stored}.state", (*at, "state"), (c.width,), (4 * c.cells,), bias=False)
            entries += linear_entries(f"{stored}.project", (*at, "project"), (c.cells,), (c.width,), bias=False)
    return Table((*entries, *linear_entries("output", ("output",), (c.width,), (c.vocab_size,))))


FAMILY = Family(
    config=ElmoConfig,
    title="ELMo",
    paper="Peters et al. 2018",
    architectures=(Architecture("BidirectionalLanguageModel", "bilm", BidirectionalLM, elmo_table),),
    tokenizers=("words",),
    objectives=("bilm",),
    example=lambda c: (jax.ShapeDtypeStruct((1, 1, c.most_characters), jnp.int32),),
    one_kind=True,
)
