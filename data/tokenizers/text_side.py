"""A text tokenizer as both sides of a pair: the input and the output of a text-to-text model, such as T5 and BART."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError
from .tokenizer import Tokenizer


class TextSide:
    """One side of a pair, see `pairs.Side`, by a tokenizer of single texts.

    The tokens of the template before a text, such as BART's `<s>`, are part of its ids; the one after it is the end
    token. Special tokens in a text are text. It draws no segmentations.

    Args:
        tokenizer: the tokenizer.
        where: its folder, for messages.

    Raises:
        DataError: its template does not end a text with one token, or it has no padding token.
    """

    def __init__(self, tokenizer: Tokenizer, where: str = "the tokenizer"):
        after, roles = tokenizer.template.after, tokenizer.special_ids
        if len(after) != 1 or "pad" not in roles:
            lacking = "padding token" if "pad" not in roles else "single token that ends a text"
            raise DataError(f"{where}: a tokenizer without a {lacking}, which a text-to-text model needs.")
        self.tokenizer = tokenizer
        self.size, self.pad_id, self.eos_id = tokenizer.vocab_size, tokenizer.pad_id, after[0]
        self.bos_id: int | None = tokenizer.template.before[0] if tokenizer.template.before else None
        self.unk_id = roles.get("unk", self.pad_id)  # byte-level BPE needs none
        self.state = json.dumps([tokenizer.fingerprint, tokenizer.template.before, self.eos_id]).encode()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        ids, lengths = self.tokenizer.encode_literally(list(texts))
        before, found, at = list(self.tokenizer.template.before), [], 0
        for length in lengths.tolist():
            found.append([*before, *ids[at : at + length].tolist()])
            at += length
        return found

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self.tokenizer.tokens[i] for i in map(int, ids)]

    def words(self, text: str) -> list[str]:
        raise DataError("Subwords are sampled only by tokenizers that were trained for translation.")

    def draw(self, word: str, number: int, amount: float, key: tuple[int, ...]) -> list[int]:
        raise DataError("Subwords are sampled only by tokenizers that were trained for translation.")

    def save(self, path: Path) -> None:
        """Write the tokenizer's files to the folder of `path`."""
        self.tokenizer.save(path.parent)

    @property
    def vocabulary(self) -> dict[str, int]:
        return self.tokenizer.backend.get_vocab()
