"""The kinds of tokenizers, spelled in one way: in flags, families and messages. Imports nothing heavy."""

from collections.abc import Mapping
from typing import Literal

TextKind = Literal["wordpiece", "byte-bpe", "unigram", "words", "characters"]
"""Kinds that `bestiary tokenizer train` trains."""
PairKind = Literal["unigram", "bpe", "word-bpe"]
"""Kinds that `bestiary translate train` trains."""
Kind = TextKind | PairKind

TITLES: Mapping[Kind, str] = {
    "wordpiece": "WordPiece",
    "byte-bpe": "byte-level BPE",
    "unigram": "SentencePiece unigram",
    "bpe": "SentencePiece BPE",
    "word-bpe": "BPE within words",
    "words": "whole words",
    "characters": "characters",
}
"""Names to display."""
FAMILIES: Mapping[TextKind, tuple[str, ...]] = {
    "wordpiece": ("bert",),
    "byte-bpe": ("roberta", "gpt2"),
    "unigram": ("albert", "t5"),
    "words": ("transfo-xl",),
    "characters": ("transfo-xl",),
}
"""Model families whose special tokens and normalisation a tokenizer can be trained with, the default first."""
