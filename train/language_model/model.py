"""A language model from a folder, with what all commands of this folder do with it."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ...data.tokenizers.pairs import PairTokenizer, TextForm
from ...data.tokenizers.text_side import TextSide
from ...data.tokenizers.tokenizer import Tokenizer
from ...models import load
from ...models.checkpoints.folder import family_of_folder, read_config
from ...models.heads.losses import cross_entropy
from ...models.layers.segments import gather_positions
from ..errors import RunError
from ..run_folder import model_folder

SHORTEST = 16  # rows are padded to a power of two, this or more, so that few lengths are compiled


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal language model with its tokenizer.

    Attributes:
        model: the model.
        params: its parameters, on the devices.
        tokenizer: its tokenizer.
    """

    model: Any
    params: Any
    tokenizer: Tokenizer

    @property
    def positions(self) -> int | None:
        """Maximum length of a text, in tokens; None for no limit."""
        return self.model.config.max_length

    @property
    def first_id(self) -> int | None:
        """The token that begins a text, or ends the one before it; None if the tokenizer has none."""
        c, known = self.model.config, self.tokenizer.special_ids
        candidates = (c.bos_token_id, c.eos_token_id, known.get("bos"), known.get("eos"))
        return next((token for token in candidates if token is not None), None)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of texts to continue, after the tokenizer's special tokens before a text."""
        before = self.tokenizer.template.before
        return [[*before, *ids] for ids in self.tokenizer.encode_batch(texts)]

    @property
    def memory(self) -> int | None:
        """Number of slots of the model's memory of the text before; None if it is no model with a memory."""
        return getattr(self.model.config, "memory", None)

    def fits(self, prompt: int, answer: int) -> bool:
        """Tell whether the model has positions for a prompt and an answer of these numbers of tokens."""
        return self.positions is None or prompt + answer <= self.positions

    def encode_answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of answers to prompts."""
        return self.tokenizer.encode_batch(texts)

    def begun(self, prompt: Sequence[int]) -> Sequence[int]:
        """Return the tokens that an output after a prompt continues."""
        return prompt

    def answer_losses(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], rows: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Compute -log p of the tokens of answers, given their prompts.

        Args:
            pairs: (prompt, answer) tokens.
            rows: maximum number of pairs at a time.

        Yields:
            (index of the pair, [tokens of its answer] float32), in any order.
        """
        return self.losses([(*prompt, *answer) for prompt, answer in pairs], [len(a) for _, a in pairs], rows)

    def losses_with_memory(self, ids: Sequence[int], window: int, slots: int, columns: int = 1) -> Iterator[np.ndarray]:
        """Compute -log p of every token of a text but the first, which is read in order with a memory.

        Args:
            ids: the text, at least two tokens.
            window: number of tokens that are read together.
            slots: number of slots of the memory, which is empty at first.
            columns: number of parts that the text is cut into, which are read together, each with its own memory.

        Yields:
            [number of predicted tokens of each window] float32
        """
        size = -(-(len(ids) - 1) // columns)  # predicted tokens of a column; the last may have fewer
        windows = -(-size // window)
        shape = (columns, windows * window)
        inputs, labels, segments = (np.zeros(shape, np.int32) for _ in range(3))
        text = np.asarray(ids, np.int32)
        for column in range(columns):
            part = text[column * size : (column + 1) * size + 1]
            count = max(0, len(part) - 1)
            inputs[column, :count], labels[column, :count], segments[column, :count] = part[:-1], part[1:], 1
        c, slots = self.model.config, min(slots, shape[1])  # more would stay empty
        same = {"same_length": c.same_length and slots > 0}  # which means as many tokens as there are slots
        model = self.model.clone(config=dataclasses.replace(c, memory=slots, **same))
        memory = model.empty_memory(columns)
        for first in range(0, shape[1], window):
            own = slice(first, first + window)
            given = (inputs[:, own], segments[:, own], labels[:, own])
            losses, memory = _losses_and_memory(model, self.params, memory, *given)
            yield np.asarray(losses)[segments[:, own] > 0]

    def losses(
        self, texts: Sequence[Sequence[int]], counts: Sequence[int], rows: int = 16
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Compute -log p of the last tokens of each text, in batches of texts of about the same length.

        Args:
            texts: token ids, each at most as long as the model has positions.
            counts: for each text, the number of its last tokens to predict, less than its length.
            rows: maximum number of texts at a time.

        Yields:
            (index of the text, [its count] float32), in an order of lengths.
        """
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), counts[i]))
        for first in range(0, len(order), rows):
            chosen = order[first : first + rows]
            length = _rounded(max(len(texts[i]) for i in chosen) - 1, self.positions)
            most = _rounded(max(counts[i] for i in chosen), self.positions)
            shape = (1 << (len(chosen) - 1).bit_length(), length)
            ids, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
            places, labels = (np.zeros((shape[0], most), np.int32) for _ in range(2))
            for row, i in enumerate(chosen):
                text, count = np.asarray(texts[i], np.int32), counts[i]
                ids[row, : len(text) - 1], segments[row, : len(text) - 1] = text[:-1], 1
                places[row, :count] = np.arange(len(text) - 1 - count, len(text) - 1)
                labels[row, :count] = text[len(text) - count :]
            found = np.asarray(_token_losses(self.model, self.params, ids, segments, places, labels))
            for row, i in enumerate(chosen):
                yield i, found[row, : counts[i]]


def _rounded(length: int, positions: int | None) -> int:
    rounded = max(SHORTEST, 1 << max(0, length - 1).bit_length())
    return rounded if positions is None else min(rounded, positions)


@partial(jax.jit, static_argnums=0)
def _token_losses(
    model: Any, params: Any, ids: jax.Array, segments: jax.Array, places: jax.Array, labels: jax.Array
) -> jax.Array:
    """Compute -log p of `labels` [B, P] after the tokens at `places` [B, P] of rows [B, L]."""

    def run(model: Any) -> jax.Array:
        states = model.output_states(ids, segments)
        return model.token_losses(gather_positions(states, places), labels)

    return model.apply({"params": params}, method=run)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _losses_and_memory(
    model: Any, params: Any, memory: Any, ids: jax.Array, segments: jax.Array, labels: jax.Array
) -> tuple[jax.Array, Any]:
    """Compute -log p of `labels` [B, L] after tokens [B, L], and the memory after them."""

    def run(model: Any) -> tuple[jax.Array, Any]:
        states, after = model.read(ids, memory, segments)
        return model.token_losses(states, labels), after

    return model.apply({"params": params}, method=run)


@dataclass(frozen=True, eq=False)
class PromptedEncoderDecoder(LanguageModel):
    """An encoder-decoder that answers prompts: they are its source, and an answer is its output.

    Attributes:
        form: how texts were prepared in its training: after a prefix, for instance.
    """

    form: TextForm = field(default_factory=TextForm)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of prompts, with the tokenizer's special tokens around them."""
        return self.tokenizer.encode_batch(
            [self.form.prepare(text, target=False) for text in texts], add_special_tokens=True
        )

    def fits(self, prompt: int, answer: int) -> bool:
        """See `LanguageModel.fits`: each side has positions of its own."""
        return self.positions is None or max(prompt, answer + 1) <= self.positions

    def encode_answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of answers, which are texts of their own."""
        return self.tokenizer.encode_batch([self.form.prepare(text.strip(), target=True) for text in texts])

    def begun(self, prompt: Sequence[int]) -> Sequence[int]:
        """See `LanguageModel.begun`: nothing, an output is a text of its own."""
        del prompt
        return ()

    def answer_losses(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], rows: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """See `LanguageModel.answer_losses`. A token that every output begins with is read, and does not count."""
        c = self.model.config
        start = [c.decoder_start_token_id, *([] if c.forced_bos_token_id is None else [c.forced_bos_token_id])]
        order = sorted(range(len(pairs)), key=lambda i: tuple(map(len, pairs[i])))
        for first in range(0, len(order), rows):
            chosen = order[first : first + rows]
            count = 1 << (len(chosen) - 1).bit_length()
            source = _rounded(max(len(pairs[i][0]) for i in chosen), self.positions)
            target = _rounded(len(start) - 1 + max(len(pairs[i][1]) for i in chosen), self.positions)
            ids, segments = (np.zeros((count, source), np.int32) for _ in range(2))
            inputs, labels = (np.zeros((count, target), np.int32) for _ in range(2))
            for row, i in enumerate(chosen):
                prompt, answer = pairs[i]
                ids[row, : len(prompt)], segments[row, : len(prompt)] = prompt, 1
                output = [*start, *answer]
                inputs[row, : len(output) - 1], labels[row, : len(output) - 1] = output[:-1], output[1:]
            found = np.asarray(_output_losses(self.model, self.params, ids, segments, inputs, labels))
            for row, i in enumerate(chosen):
                yield i, found[row, len(start) - 1 :][: len(pairs[i][1])]


@partial(jax.jit, static_argnums=0)
def _output_losses(
    model: Any, params: Any, ids: jax.Array, segments: jax.Array, inputs: jax.Array, labels: jax.Array
) -> jax.Array:
    """Compute -log p of outputs `labels` [B, T] of sources [B, S], whose decoder reads `inputs` [B, T]."""
    logits = model.apply({"params": params}, ids, segments, None, inputs)
    return cross_entropy(logits, labels)[0]


def open_language_model(folder: Path, dtype: str = "float32", *, encoder_decoder: bool = False) -> LanguageModel:
    """Load the language model of a run folder or a checkpoint folder.

    Args:
        folder: the folder.
        dtype: compute dtype.
        encoder_decoder: also take a model that generates texts from a source.

    Raises:
        RunError: it is no language model, or has no tokenizer for texts.
    """
    folder = model_folder(folder)
    family = family_of_folder(read_config(folder), folder)
    found: Any = LanguageModel if "causal_lm" in family.heads else None
    if encoder_decoder and "generation" in family.heads:
        found = PromptedEncoderDecoder
    if found is None:
        raise RunError(f"{folder}: holds a {family.title}, which is no language model that predicts the next token.")
    head = "causal_lm" if found is LanguageModel else None if family.one_kind else "generation"
    loaded = load(folder, head=head, dtype=dtype)
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise RunError(f"{folder}: no tokenizer files. Put those of the model's tokenizer there.")
    more: dict[str, Any] = {}
    if isinstance(tokenizer, PairTokenizer) and isinstance(tokenizer.source, TextSide):
        if found is PromptedEncoderDecoder:
            more["form"] = tokenizer.form
        tokenizer = tokenizer.source.tokenizer  # of a text-to-text model, which has one for both sides
    if not isinstance(tokenizer, Tokenizer):
        raise RunError(f"{folder}: its tokenizer is one of two languages, for `bestiary translate`, not of prompts.")
    return found(loaded.model, jax.device_put(loaded.params), tokenizer, **more)
