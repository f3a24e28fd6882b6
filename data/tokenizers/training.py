"""Train a tokenizer of any kind on documents."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..corpus.corpus import Document
from ..errors import DataError
from ..progress import ProgressCallback
from .byte_bpe import train_byte_bpe
from .kinds import FAMILIES, TextKind
from .sentence_piece import train_unigram
from .tokenizer import Tokenizer
from .word_level import train_whole
from .wordpiece import train_wordpiece


def train_tokenizer(
    kind: TextKind,
    documents: Iterable[Document],
    *,
    vocab_size: int,
    family: str | None = None,
    lowercase: bool = True,
    progress: ProgressCallback | None = None,
) -> Tokenizer:
    """Train a tokenizer, deterministically.

    Args:
        kind: wordpiece, byte-bpe, unigram, words or characters.
        documents: documents to train on.
        vocab_size: maximum vocabulary size, including special tokens (but not T5's sentinels).
        family: model family whose special tokens and normalisation it gets, one of `FAMILIES[kind]`; None: the first.
        lowercase: lower-case the text and strip accents; only wordpiece and ALBERT's unigram do.
        progress: called at most once a second with the progress.

    Raises:
        DataError: the text is too small, the vocabulary size too small for the text, or the family another kind's.
    """
    if family not in (None, *FAMILIES[kind]):
        raise DataError(f"family {family}: {kind} tokenizers are trained as {' or '.join(FAMILIES[kind])}.")
    named: Any = family or FAMILIES[kind][0]
    if kind == "wordpiece":
        return train_wordpiece(documents, vocab_size=vocab_size, lowercase=lowercase, progress=progress)
    if kind == "byte-bpe":
        return train_byte_bpe(documents, vocab_size=vocab_size, family=named, progress=progress)
    if kind in ("words", "characters"):
        return train_whole(kind, documents, vocab_size=vocab_size, progress=progress)
    return train_unigram(documents, vocab_size=vocab_size, family=named, lowercase=lowercase, progress=progress)
