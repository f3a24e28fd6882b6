"""WordPiece (BERT and its relatives): split at spaces and punctuation, then longest match; `##ing` continues a word.

A folder holds

    tokenizer.json           the whole tokenizer
    vocab.txt                one token per line; its id is the line number, from 0
    tokenizer_config.json    tokenizer_class, do_lower_case, strip_accents, tokenize_chinese_chars, the special tokens
    special_tokens_map.json  the special tokens by role
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from ..corpus.corpus import Document
from ..errors import DataError
from ..progress import ProgressCallback, Reporter
from .template import Template, bert_template
from .tokenizer import Tokenizer, read_paragraphs

SPECIAL_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
CONTINUATION = "##"
_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)  # Unicode's
_LONGEST_WORD = 100  # characters; a longer word is [UNK], as in the released tokenizers


class WordPieceTokenizer(Tokenizer):
    """BERT's tokenizer: `[CLS] A [SEP] B [SEP]`, with token types 0 and 1.

    Args:
        backend: a `tokenizers.Tokenizer` with a WordPiece model.
        special_tokens: all five special tokens of BERT, by role.
        settings: more entries of tokenizer_config.json.
        template: special tokens around a text, if not BERT's.
        where: name for error messages.

    Raises:
        DataError: the vocabulary lacks a special token.
    """

    kind = "wordpiece"

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] = SPECIAL_TOKENS,
        *,
        settings: Mapping[str, Any] | None = None,
        template: Template | None = None,
        where: str = "the tokenizer",
    ):
        special_tokens = {**SPECIAL_TOKENS, **special_tokens}
        missing = [special_tokens[role] for role in SPECIAL_TOKENS if backend.token_to_id(special_tokens[role]) is None]
        if missing:
            raise DataError(
                f"{where}: the vocabulary has no {', '.join(missing)}. Pretraining needs "
                f"{', '.join(SPECIAL_TOKENS.values())}; take a BERT vocabulary, or train one: bestiary tokenizer train."
            )
        if template is None:
            template = bert_template(backend, special_tokens, where)
        super().__init__(backend, template, special_tokens, settings=settings or {}, where=where)
        bert = next((step for step in self._normalization if step.get("type") == "BertNormalizer"), {})
        self.settings = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": self.lowercase,
            "strip_accents": bert.get("strip_accents"),
            "tokenize_chinese_chars": bert.get("handle_chinese_chars", True),
            **self.settings,
        }

    def _continues(self, piece: str) -> bool:
        return piece.startswith(CONTINUATION) and piece != CONTINUATION

    def _save_vocabulary(self, folder: Path) -> None:
        pieces = sorted(self._state["model"]["vocab"].items(), key=lambda pair: pair[1])
        (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece, _ in pieces), encoding="utf-8")


def bert_backend(
    vocabulary: Mapping[str, int],
    *,
    lowercase: bool,
    strip_accents: bool | None = None,
    chinese: bool = True,
    unk: str = SPECIAL_TOKENS["unk"],
) -> tokenizers.Tokenizer:
    """Build BERT's tokenizer from a vocabulary: normalise, split at spaces and punctuation, then WordPiece.

    Args:
        vocabulary: ids of the tokens.
        lowercase: lower-case the text.
        strip_accents: strip accents; None: if the text is lower-cased.
        chinese: make every Chinese character a word.
        unk: the token for words outside the vocabulary.
    """
    model = models.WordPiece(dict(vocabulary), unk_token=unk, max_input_chars_per_word=_LONGEST_WORD)
    return _bert(model, lowercase=lowercase, strip_accents=strip_accents, chinese=chinese)


def read_vocabulary(path: Path) -> dict[str, int]:
    """Read the ids in a vocab.txt: one token per line, ended by a line feed; blank lines at the end are ignored.

    White space at the end of a line is none of the token, as in the reference implementation.

    Raises:
        DataError: it is not UTF-8, or a token is repeated; with file and line.
    """
    try:
        pieces = path.read_bytes().decode("utf-8").rstrip("\r\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not a vocabulary: not UTF-8 at byte {error.start}. Expected one token per line."
        ) from None
    vocabulary: dict[str, int] = {}
    for number, piece in enumerate(pieces):
        piece = piece.rstrip(_WHITE_SPACE)
        if piece in vocabulary:
            raise DataError(f"{path}, line {number + 1}: the piece {piece!r} is also on line {vocabulary[piece] + 1}.")
        vocabulary[piece] = number
    return vocabulary


def train_wordpiece(
    documents: Iterable[Document],
    *,
    vocab_size: int = 30_522,
    lowercase: bool = True,
    min_frequency: int = 2,
    alphabet_limit: int = 1000,
    progress: ProgressCallback | None = None,
) -> WordPieceTokenizer:
    """Learn a WordPiece vocabulary from documents, deterministically.

    The trainer is that of `tokenizers`, as for WordPiece vocabularies trained with the Hugging Face libraries: it
    repeatedly merges the most frequent pair of subwords. Ids 0 to 4 are [PAD], [UNK], [CLS], [SEP], [MASK]; single
    characters follow, then the learnt subwords in the order of learning.

    Args:
        documents: documents, read twice (an iterator is kept in memory).
        vocab_size: maximum vocabulary size, including special tokens; a small corpus may give fewer.
        lowercase: lower-case the text and strip accents, as the uncased models do.
        min_frequency: minimum frequency of a pair to be merged.
        alphabet_limit: maximum number of characters to keep, most frequent first; words with others are [UNK].

    Raises:
        DataError: the vocabulary size is too small for the special tokens and the alphabet.
    """
    if iter(documents) is documents:
        documents = list(documents)
    backend = _bert(models.WordPiece(unk_token=SPECIAL_TOKENS["unk"]), lowercase=lowercase)
    alphabet = _alphabet(documents, backend, alphabet_limit, Reporter("counting characters", "MB", progress))
    # The trainer numbers the continuing characters in the order of a hash table, another one each run, and breaks
    # ties between merges by number. Named as special tokens they have their numbers before it starts, and the outcome
    # is one and the same.
    continuing = [f"{CONTINUATION}{character}" for character in alphabet if _continues(character, backend)]
    given = [*SPECIAL_TOKENS.values(), *alphabet, *continuing]
    if vocab_size <= len(given):
        raise DataError(
            f"A vocabulary of {vocab_size} pieces: too small. The special tokens and the corpus's {len(alphabet)} "
            f"characters alone take {len(given)}; allow more pieces, or fewer characters."
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        special_tokens=given,
        continuing_subword_prefix=CONTINUATION,
        show_progress=False,
    )
    report = Reporter("reading for the vocabulary", "MB", progress)
    backend.train_from_iterator(read_paragraphs(documents, report), trainer)
    trained = bert_backend(backend.get_vocab(), lowercase=lowercase)
    trained.add_special_tokens(list(SPECIAL_TOKENS.values()))
    return WordPieceTokenizer(trained)


def _alphabet(documents: Iterable[Document], backend: tokenizers.Tokenizer, limit: int, report: Reporter) -> list[str]:
    """Return the most frequent characters of the normalised text, in the order of their code points."""
    raw = np.zeros(0x110000, np.int64)
    for paragraphs in read_paragraphs(documents, report):
        codes = np.frombuffer("".join(paragraphs).encode("utf-32-le", "surrogatepass"), np.uint32)
        counted = np.bincount(codes)
        raw[: counted.size] += counted
    counts: Counter[str] = Counter()
    for code in np.flatnonzero(raw):
        # Normalising goes character by character, so that each needs to be normalised once only.
        for character in backend.normalizer.normalize_str(chr(code)):
            if not character.isspace():
                counts[character] += int(raw[code])
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    return sorted(ranked[:limit])


def _continues(character: str, backend: tokenizers.Tokenizer) -> bool:
    """Tell whether the character can be inside a word: punctuation and Chinese characters are separate words."""
    return len(backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(f"a{character}a"))) == 1


def _bert(
    model: models.WordPiece, *, lowercase: bool, strip_accents: bool | None = None, chinese: bool = True
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=chinese, strip_accents=strip_accents, lowercase=lowercase
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix=CONTINUATION)
    return backend
