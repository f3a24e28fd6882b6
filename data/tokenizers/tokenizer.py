"""The interface of all tokenizers: ids, offsets, special tokens, word boundaries, a template.

The kinds are WordPiece (`wordpiece`), byte-level BPE (`byte_bpe`) and SentencePiece (`sentence_piece`);
`loading.load_tokenizer` chooses the kind for a folder. All of them use the `tokenizers` library, like the reference
implementation, so that ids and offsets are the same.

A tokenizer is a function from texts to a model's inputs:

    tokenizer = load_tokenizer("roberta-folder")
    batch = tokenizer(["A first text.", "And another one."])  # input_ids, segment_ids, token_type_ids [B, L]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import tokenizers
from tokenizers import models

from ..corpus.corpus import Document
from ..errors import DataError
from ..json_files import write_json
from ..progress import Reporter
from .kinds import Kind
from .template import Template, token_ids, write_template

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_NEEDED_FOR = {
    "bos": "which begins a generated text",
    "eos": "which ends a generated text",
    "unk": "which replaces text outside the vocabulary",
    "sep": "which ends each text of a pair",
    "cls": "from which classification reads a whole text",
    "mask": "which replaces a masked token",
}
_COPIES = ("_literal", "_spaced")  # copies of the backend, with options that its JSON does not include


class Encoded(NamedTuple):
    """Texts, or pairs of texts, with the special tokens around them."""

    ids: list[list[int]]
    types: list[list[int]]  # token types, as many as ids
    truncated: int  # number of truncated tokens


class Tokenizer:
    """Text to ids and back; the kinds are its subclasses.

    Args:
        backend: the underlying `tokenizers.Tokenizer`. Its own template is not used.
        template: special tokens around a text or a pair.
        special_tokens: existing tokens by role ("bos", "eos", "unk", "sep", "pad", "cls", "mask").
        settings: entries for `tokenizer_config.json`, including `tokenizer_class`.
        where: name for error messages.

    Attributes:
        kind: kind of the tokenizer.
        special_ids: ids by role, for roles with a token in the vocabulary.
        pad_id: id of the padding token. No token ever attends to it, so that it is 0 if there is no padding token.
        vocab_size: number of tokens, V.

    Raises:
        DataError: ids are not consecutive from 0.
    """

    kind: Kind

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        template: Template,
        special_tokens: Mapping[str, str],
        *,
        settings: Mapping[str, Any],
        where: str = "the tokenizer",
    ):
        self.backend, self.template, self.settings = backend, template, dict(settings)
        vocabulary = backend.get_vocab()
        self.special_tokens = {role: token for role, token in special_tokens.items() if token in vocabulary}
        self.special_ids = {role: vocabulary[token] for role, token in self.special_tokens.items()}
        self.pad_id = self.special_ids.get("pad", 0)
        self.vocab_size = backend.get_vocab_size()
        highest = max(vocabulary.values(), default=-1)
        if highest != self.vocab_size - 1:
            raise DataError(
                f"{where}: {self.vocab_size} tokens, but the highest id is {highest}. Ids must be consecutive from 0."
            )

    # Special tokens

    def _id(self, role: str) -> int:
        if role not in self.special_ids:
            raise DataError(f"The tokenizer has no {role} token, {_NEEDED_FOR[role]}.")
        return self.special_ids[role]

    @property
    def bos_id(self) -> int:
        """Id of the token that begins a generated text. Like all the others, raises DataError if there is none."""
        return self._id("bos")

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a generated text."""
        return self._id("eos")

    @property
    def unk_id(self) -> int:
        """Id of the token for text outside the vocabulary."""
        return self._id("unk")

    @property
    def cls_id(self) -> int:
        """Id of the token that begins an input to classify."""
        return self._id("cls")

    @property
    def sep_id(self) -> int:
        """Id of the token that ends a text."""
        return self._id("sep")

    @property
    def mask_id(self) -> int:
        """Id of the token that replaces masked tokens."""
        return self._id("mask")

    # The vocabulary

    @cached_property
    def _state(self) -> dict[str, Any]:
        return json.loads(self.backend.to_str())

    @cached_property
    def tokens(self) -> list[str]:
        """Tokens by id."""
        return [piece for piece, _ in sorted(self.backend.get_vocab().items(), key=lambda pair: pair[1])]

    @cached_property
    def special(self) -> np.ndarray:
        """[V] bool: tokens that represent no text ([PAD], </s>, <extra_id_0>, ...), and are never predicted."""
        known = set(self.special_tokens.values())
        known |= {added["content"] for added in self._state["added_tokens"] if added["special"]}
        return np.array([piece in known for piece in self.tokens], np.bool_)

    @cached_property
    def continuation(self) -> np.ndarray:
        """[V] bool: tokens that continue the word of the token before."""
        whole = {added["content"] for added in self._state["added_tokens"]}
        return np.array([piece not in whole and self._continues(piece) for piece in self.tokens], np.bool_)

    def _continues(self, piece: str) -> bool:
        raise NotImplementedError

    @property
    def lowercase(self) -> bool:
        """Whether text is lower-cased first."""
        return any(step.get("lowercase") or step.get("type") == "Lowercase" for step in self._normalization)

    @property
    def _normalization(self) -> list[dict[str, Any]]:
        normalizer = self._state.get("normalizer") or {}
        return normalizer.get("normalizers", [normalizer])

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal; equal for two tokenizers that give every text the same ids, before adding special tokens."""
        parts = {name: self._state.get(name) for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    # Texts to ids

    def __call__(
        self, first: Sequence[str], second: Sequence[str] | None = None, *, max_length: int | None = None
    ) -> dict[str, np.ndarray]:
        """Return a model's inputs for texts, or pairs of texts.

        Args:
            first: B texts.
            second: the second text of each pair.
            max_length: maximum number of tokens per row, including special tokens; longer texts are truncated.

        Returns:
            input_ids, segment_ids (1 on the text, 0 on padding) and token_type_ids, [B, L] int32 each.
        """
        if isinstance(first, str):
            raise TypeError("give a list of texts: tokenizer([text])")
        encoded = self.encode(first, second, max_length)
        shape = len(encoded.ids), max(map(len, encoded.ids), default=0)
        batch = {name: np.zeros(shape, np.int32) for name in ("input_ids", "segment_ids", "token_type_ids")}
        batch["input_ids"][:] = self.pad_id
        for row, (ids, types) in enumerate(zip(encoded.ids, encoded.types, strict=True)):
            batch["input_ids"][row, : len(ids)] = ids
            batch["segment_ids"][row, : len(ids)] = 1
            batch["token_type_ids"][row, : len(ids)] = types
        return batch

    def encode(
        self, first: Sequence[str], second: Sequence[str] | None = None, max_length: int | None = None
    ) -> Encoded:
        """Encode texts, or pairs of texts, with the family's special tokens, in at most `max_length` tokens.

        Longer texts are truncated at the end, the longer of a pair first, as in the reference implementation.

        Raises:
            DataError: the special tokens alone are longer.
        """
        parts = [self.encode_batch(first)]
        if second is not None:
            parts.append(self.encode_batch(second))
        ids, types, truncated = [], [], 0
        for some in zip(*parts, strict=True):
            if max_length is not None:
                a, b = self.template.cut(len(some[0]), len(some[1]) if len(some) > 1 else None, max_length)
                whole = sum(map(len, some))
                some = tuple(part[:size] for part, size in zip(some, (a, b), strict=False))
                truncated += whole - sum(map(len, some))
            joined, joined_types = self.join(*some)
            ids.append(joined)
            types.append(joined_types)
        return Encoded(ids, types, truncated)

    def join(self, first: Sequence[int], second: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
        """Return the ids and token types of a text or a pair, adding the template's special tokens."""
        return self.template.join(first, second)

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[list[int]]:
        """Return the ids of each text, without truncation; with `add_special_tokens`, with the family's around it.

        A special token that occurs in a text becomes that token.
        """
        encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        ids = [encoding.ids for encoding in encoded]
        return [self.join(some)[0] for some in ids] if add_special_tokens else ids

    def encode_literally(self, texts: Sequence[str], dtype: Any = np.int32) -> tuple[np.ndarray, np.ndarray]:
        """Encode many texts, treating special tokens in them as text ("[SEP]" in a corpus).

        Returns:
            The tokens of all texts, concatenated, [T] of `dtype`; and the number of tokens of each, [N] int64.
        """
        encoded = self._literal.encode_batch_fast(texts, add_special_tokens=False)
        lengths = np.fromiter((len(encoding) for encoding in encoded), np.int64, len(encoded))
        return np.fromiter(chain.from_iterable(e.ids for e in encoded), dtype, int(lengths.sum())), lengths

    def encode_words(self, words: Sequence[str]) -> list[list[int]]:
        """Return the ids of each word of texts that are already split into words, as after a space."""
        return [encoding.ids for encoding in self._spaced.encode_batch_fast(words, add_special_tokens=False)]

    def encode_with_spans(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the ids of each text, [T] int32, and their spans, [T, 2] int32, without special tokens.

        A span is the index of the token's first character (Unicode code point of the given text) and of the one after
        its last, without the space before it; a character shared by two tokens is in both spans.
        """
        encoded = self.backend.encode_batch(texts, add_special_tokens=False)
        return [
            (np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int32).reshape(-1, 2))
            for encoding in encoded
        ]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ids."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        backend = _read_backend(self.backend.to_str())
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def _spaced(self) -> tokenizers.Tokenizer:
        """The backend for single words."""
        return self.backend

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name not in _COPIES}
        return {**kept, "backend": self.backend.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, backend=_read_backend(state["backend"]))

    def delimited(self, before: str, between: str, after: str) -> Self:
        """Return the tokenizer with these special tokens before, between and after texts; new ones get the next ids."""
        backend = _read_backend(self.backend.to_str())
        backend.add_special_tokens([before, between, after])
        first, middle, last = token_ids(backend, (before, between, after), "the tokenizer")
        template = Template((first,), (middle,), (last,))
        backend.post_processor = write_template(template, backend)
        roles = {"cls": after, "sep": between}
        return type(self)(backend, template, {**self.special_tokens, **roles}, settings=self.settings)

    # Files

    def save(self, folder: str | Path) -> None:
        """Write the files of the released format to `folder`, which is created if needed.

        transformers' AutoTokenizer loads them to the same ids.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"), pretty=True)
        self._save_vocabulary(folder)
        beyond = set(self.backend.get_vocab()) - set(self.backend.get_vocab(with_added_tokens=False))
        if beyond:
            added = {token: number for number, token in enumerate(self.tokens) if token in beyond}
            write_json(folder / "added_tokens.json", added, ensure_ascii=False)
        roles = {f"{role}_token": token for role, token in self.special_tokens.items()}
        write_json(folder / "tokenizer_config.json", {**self.settings, **roles}, ensure_ascii=False)
        write_json(folder / "special_tokens_map.json", roles)

    def _save_vocabulary(self, folder: Path) -> None:
        """Write the vocabulary in the kind's own files."""
        raise NotImplementedError


def check_vocabulary(tokenizer: Tokenizer, rows: int, where: str) -> None:
    """Check that a model's embedding table has a row for each token; a padded table is fine.

    Raises:
        DataError: it has too few rows.
    """
    if tokenizer.vocab_size > rows:
        raise DataError(
            f"{where}: the tokenizer has {tokenizer.vocab_size:,} tokens, but the model's embedding table has "
            f"{rows:,} rows. Use the tokenizer that the model was trained with."
        )


def _read_backend(text: str) -> tokenizers.Tokenizer:
    """Build a backend from its JSON, with bit-exact scores: the library's own parsing rounds them."""
    backend = tokenizers.Tokenizer.from_str(text)
    if isinstance(backend.model, models.Unigram):
        said = json.loads(text)["model"]
        pieces = [(piece, score) for piece, score in said["vocab"]]
        backend.model = models.Unigram(pieces, unk_id=said["unk_id"], byte_fallback=said["byte_fallback"])
    return backend


def read_paragraphs(documents: Iterable[Document], report: Reporter) -> Iterator[list[str]]:
    """Yield the paragraphs of each document, for a trainer; `report` is called with the numbers of characters."""
    characters = 0
    for document in documents:
        yield document.paragraphs()
        characters += len(document.text)
        report(characters / 1e6, None)
    report(characters / 1e6, None, final=True)


LONGEST = 1 << 16
"""Maximum length of a text that SentencePiece learns from, in bytes of UTF-8."""


def cut_at_spaces(text: str) -> Iterator[str]:
    """Yield the text in parts of at most `LONGEST` bytes, cut at spaces where there are any.

    SentencePiece would skip a longer text without a word; its pieces end at spaces, so that cutting there loses none.
    """
    start = 0
    while start < len(text):
        part = text[start : start + LONGEST].encode()[:LONGEST].decode(errors="ignore")
        if start + len(part) < len(text):
            part = part[: part.rfind(" ") + 1] or part
        yield part
        start += len(part)
