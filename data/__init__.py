"""Text in, batches of NumPy arrays out; this package never imports JAX by itself.

    corpus.py       documents from text, Markdown, WikiText, JSON lines, gzip and zstd of these, and TFDS folders
    reading.py      bytes to lines, every error with its file, line and column
    python_docs.py  the corpus that every Python carries: its own documentation
    markup.py       Markdown, WikiText and reStructuredText to plain paragraphs
    sentences.py    paragraphs to sentences
    tokenizers/     loading.py finds out which: wordpiece.py, byte_bpe.py, sentence_piece.py; pairs.py for translation
    fingerprint.py  what a corpus is, in one short string
    cache.py        the tokenised corpus, ArrayRecord; cache_build.py makes it, once
    packing.py      several examples in a row
    rows/           rows by their number, planned from lengths alone: one file an objective's rows
    stream.py       the stream of batches (Grain)
    parallel.py     pairs of sentences from two files, TSV, JSON lines and TFDS folders
    subwords.py     pieces for translation: SentencePiece and BPE, trained, sampled, saved
    segmentation.py subword regularisation: a word's segmentations, drawn by number
    phrases.py      the parallel text that comes along: CLDR's dates, durations, amounts and quantities
    examples.py     fine-tuning's features: batches of a fixed number of them in packed rows of few shapes
    tables_text.py  texts and labels from TSV, CSV and JSON lines with named columns
    glue.py         GLUE's nine tasks and its diagnostic set
    squad.py        questions answered by spans, and windows of their contexts
    multiple_choice.py  SWAG and CODAH
    tagging.py      CoNLL columns and CoNLL-U
    cores.py        how many cores there are to work with

Names are imported on first use: Grain and tensorflow-datasets take seconds that `--help` should not pay for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .corpus.corpus import EMBEDDED as EMBEDDED
    from .corpus.corpus import Corpus as Corpus
    from .corpus.corpus import Document as Document
    from .corpus.corpus import embedded_documents as embedded_documents
    from .corpus.corpus import read_documents as read_documents
    from .corpus.sentences import split_sentences as split_sentences
    from .errors import CorpusError as CorpusError
    from .errors import DataError as DataError
    from .packing import Statistics as Statistics
    from .progress import Report as Report
    from .rows.full_sentences import FullSentenceRows as FullSentenceRows
    from .rows.sentence_pairs import SentencePairRows as SentencePairRows
    from .store import TokenCache as TokenCache
    from .store import build_cache as build_cache
    from .store import open_cache as open_cache
    from .stream import evaluation_batches as evaluation_batches
    from .stream import training_batches as training_batches
    from .tokenizers.byte_bpe import train_byte_bpe as train_byte_bpe
    from .tokenizers.loading import load_tokenizer as load_tokenizer
    from .tokenizers.sentence_piece import train_unigram as train_unigram
    from .tokenizers.tokenizer import Tokenizer as Tokenizer
    from .tokenizers.wordpiece import train_wordpiece as train_wordpiece

_HOME = {
    "training_batches": "stream",
    "evaluation_batches": "stream",
    "TokenCache": "store",
    "build_cache": "store",
    "open_cache": "store",
    "EMBEDDED": "corpus.corpus",
    "Corpus": "corpus.corpus",
    "Document": "corpus.corpus",
    "embedded_documents": "corpus.corpus",
    "read_documents": "corpus.corpus",
    "CorpusError": "errors",
    "DataError": "errors",
    "Statistics": "packing",
    "FullSentenceRows": "rows.full_sentences",
    "SentencePairRows": "rows.sentence_pairs",
    "Report": "progress",
    "split_sentences": "corpus.sentences",
    "Tokenizer": "tokenizers.tokenizer",
    "load_tokenizer": "tokenizers.loading",
    "train_byte_bpe": "tokenizers.byte_bpe",
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
