"""Text and images in, batches of NumPy arrays out; this package never imports JAX.

    corpus/      documents, sentences and pairs from text, and stores of these, tokenised
    tokenizers/  text to ids
    tasks/       the labelled data of fine-tuning: GLUE, SQuAD, tagging, multiple choice, tables
    rows/        rows by number, planned from lengths alone: one file per objective's rows
    images/      images in the usual formats, preprocessing, augmentation, and their batches
    store        tokenised text on disk: written once (store_build), read at random
    stream       the stream of batches of such rows (Grain)
    batches      fine-tuning's features: batches of a fixed number of them in packed rows of few shapes
    packing      several examples per row
    reading      bytes to lines; every error has its file, line and column

The names below are imported on first use: Grain and tensorflow-datasets take seconds, which would delay `--help`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .corpus.corpus import EMBEDDED as EMBEDDED
    from .corpus.corpus import Corpus as Corpus
    from .corpus.document_store import DocumentStore as DocumentStore
    from .corpus.document_store import build_documents as build_documents
    from .errors import CorpusError as CorpusError
    from .errors import DataError as DataError
    from .rows.full_sentences import FullSentenceRows as FullSentenceRows
    from .rows.sentence_pairs import SentencePairRows as SentencePairRows
    from .stream import evaluation_batches as evaluation_batches
    from .stream import training_batches as training_batches
    from .tokenizers.byte_bpe import train_byte_bpe as train_byte_bpe
    from .tokenizers.loading import load_tokenizer as load_tokenizer
    from .tokenizers.sentence_piece import train_unigram as train_unigram
    from .tokenizers.tokenizer import Tokenizer as Tokenizer
    from .tokenizers.training import train_tokenizer as train_tokenizer
    from .tokenizers.wordpiece import train_wordpiece as train_wordpiece

_HOME = {
    "EMBEDDED": "corpus.corpus",
    "Corpus": "corpus.corpus",
    "DocumentStore": "corpus.document_store",
    "build_documents": "corpus.document_store",
    "CorpusError": "errors",
    "DataError": "errors",
    "FullSentenceRows": "rows.full_sentences",
    "SentencePairRows": "rows.sentence_pairs",
    "evaluation_batches": "stream",
    "training_batches": "stream",
    "Tokenizer": "tokenizers.tokenizer",
    "load_tokenizer": "tokenizers.loading",
    "train_byte_bpe": "tokenizers.byte_bpe",
    "train_tokenizer": "tokenizers.training",
    "train_unigram": "tokenizers.sentence_piece",
    "train_wordpiece": "tokenizers.wordpiece",
}
__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_HOME)
