"""Whole words, or characters, as tokens: the vocabularies of language models before subwords, and of small experiments.

Words are what stands between white space, numbered by frequency as an adaptive softmax wants it; the end of a line is
the token `<eos>`. So are WikiText's vocabularies made by the authors of Transformer-XL (Dai et al. 2019). Characters
are Unicode code points, also numbered by frequency. What is not in the vocabulary is `<unk>`. A folder holds

    tokenizer.json           the whole tokenizer
    vocab.json               the ids of the words or characters
    tokenizer_config.json    tokenizer_class, the special tokens
    special_tokens_map.json  the special tokens by role
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from ..corpus.corpus import Document
from ..errors import DataError
from ..json_files import write_json
from ..progress import ProgressCallback, Reporter
from .template import Template, write_template
from .tokenizer import Tokenizer, read_paragraphs

EOS, UNK = "<eos>", "<unk>"
TOKENS = {"eos": EOS, "unk": UNK}
_LINE_END = "\n"  # between the paragraphs of a document


class WholeTokenizer(Tokenizer):
    """Base of both kinds. Texts have no special tokens around them."""

    def _continues(self, piece: str) -> bool:
        return False  # of a character, only the one before would tell

    def _save_vocabulary(self, folder: Path) -> None:
        write_json(folder / "vocab.json", self._state["model"]["vocab"], ensure_ascii=False)


class WordTokenizer(WholeTokenizer):
    """Words between white space. `<unk>` and `<eos>` in a text are these tokens, as in WikiText."""

    kind = "words"


class CharacterTokenizer(WholeTokenizer):
    """Unicode code points; `<eos>` ends a text, and the end of a line is a character as any other."""

    kind = "characters"


def train_whole(
    kind: Literal["words", "characters"],
    documents: Iterable[Document],
    *,
    vocab_size: int,
    progress: ProgressCallback | None = None,
) -> WholeTokenizer:
    """Number the words or characters of documents by frequency, after `<eos>` and `<unk>`.

    Args:
        kind: words or characters.
        documents: documents, read once.
        vocab_size: maximum vocabulary size, including special tokens; rarer ones become `<unk>`.
        progress: called at most once a second with the progress.

    Raises:
        DataError: the vocabulary size leaves no room for words.
    """
    special = list(TOKENS.values())
    if vocab_size <= len(special):
        raise DataError(f"A vocabulary of {vocab_size} {kind}: too small; {len(special)} are special tokens.")
    counts: Counter[str] = Counter()
    for paragraphs in read_paragraphs(documents, Reporter("reading for the vocabulary", "MB", progress)):
        for number, text in enumerate(paragraphs):
            counts.update(text.split() if kind == "words" else text)
            counts[_LINE_END] += number > 0
    if kind == "words":
        del counts[_LINE_END]  # it is <eos>
    vocabulary = _numbered(ranked(counts)[: vocab_size - len(special)])
    if kind == "words":
        return WordTokenizer(word_backend(vocabulary), Template(), TOKENS, settings=SETTINGS)
    return CharacterTokenizer(character_backend(vocabulary), Template(), TOKENS, settings=SETTINGS)


def ranked(counts: Mapping[str, int]) -> list[str]:
    """Return words or characters by frequency, without the special tokens."""
    return sorted(counts.keys() - TOKENS.values(), key=lambda item: (-counts[item], item))


def _numbered(items: Iterable[str]) -> dict[str, int]:
    return {item: number for number, item in enumerate([*TOKENS.values(), *items])}


def word_tokenizer(words: Iterable[str]) -> WordTokenizer:
    """Return the tokenizer of different words, whose texts end in `<eos>`."""
    backend, template = word_backend(_numbered(words)), Template(after=(0,))
    backend.post_processor = write_template(template, backend)
    return WordTokenizer(backend, template, TOKENS, settings=SETTINGS)


SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast"}


def word_backend(vocabulary: Mapping[str, int]) -> tokenizers.Tokenizer:
    """Build the tokenizer of words from a vocabulary with `<eos>` and `<unk>`."""
    backend = tokenizers.Tokenizer(models.WordLevel(dict(vocabulary), unk_token=UNK))
    backend.normalizer = normalizers.Replace(_LINE_END, f" {EOS} ")
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    spaced = decoders.WordPiece(prefix=_LINE_END, cleanup=False)  # a space before all words: none has this prefix
    backend.decoder = decoders.Sequence([spaced, decoders.Fuse(), decoders.Replace(Regex(f" ?{EOS} ?"), _LINE_END)])
    return backend


def character_backend(vocabulary: Mapping[str, int]) -> tokenizers.Tokenizer:
    """Build the tokenizer of characters from a vocabulary with `<eos>` and `<unk>`: BPE without merges."""
    backend = tokenizers.Tokenizer(models.BPE(dict(vocabulary), [], unk_token=UNK))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([EOS, UNK])
    return backend
