"""WordPiece: training, loading and saving of BERT's tokenizer, by the `tokenizers` library.

A tokenizer folder is in the released format, which transformers' AutoTokenizer loads to the same ids:

    tokenizer.json           the whole tokenizer
    vocab.txt                a piece a line, its id the line's number from 0
    tokenizer_config.json    tokenizer_class, do_lower_case, strip_accents, tokenize_chinese_chars, the special tokens
    special_tokens_map.json  the special tokens by role

Loading takes such a folder, one with `vocab.txt` alone, a `vocab.txt`, or a `tokenizer.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from ..corpus.corpus import Document
from ..errors import DataError
from ..progress import ProgressCallback, Reporter

SPECIAL_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
CONTINUATION = "##"
_LONGEST_WORD = 100  # characters; a longer word is [UNK], as in the released tokenizers


class Tokenizer:
    """A WordPiece tokenizer, its special tokens' ids, and what masking needs to know of its vocabulary.

    `backend` is the `tokenizers.Tokenizer` that does the work; `lowercase` tells whether the text is lower-cased and
    stripped of accents first.
    """

    def __init__(self, backend: tokenizers.Tokenizer, where: str = "the tokenizer"):
        self.backend = backend
        self._state = json.loads(backend.to_str())
        kind = self._state["model"].get("type")
        if kind != "WordPiece":
            raise DataError(f"{where}: a {kind} tokenizer; expected WordPiece, as BERT's is.")
        vocabulary = backend.get_vocab()
        missing = [token for token in SPECIAL_TOKENS.values() if token not in vocabulary]
        if missing:
            raise DataError(
                f"{where}: the vocabulary has no {', '.join(missing)}. Pretraining needs "
                f"{', '.join(SPECIAL_TOKENS.values())}; take a BERT vocabulary, or train one: bestiary tokenizer train."
            )
        ids = [vocabulary[token] for token in SPECIAL_TOKENS.values()]
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids
        self.vocab_size = backend.get_vocab_size()
        highest = max(vocabulary.values())
        if highest != self.vocab_size - 1:
            raise DataError(
                f"{where}: {self.vocab_size} pieces, but the highest id is {highest}. Ids must run from 0 without gaps."
            )

    @cached_property
    def tokens(self) -> list[str]:
        """The pieces by id."""
        return [piece for piece, _ in sorted(self.backend.get_vocab().items(), key=lambda pair: pair[1])]

    @cached_property
    def continuation(self) -> np.ndarray:
        """[V] bool: the piece continues a word (it begins with ##)."""
        return np.array([piece.startswith(CONTINUATION) and piece != CONTINUATION for piece in self.tokens], np.bool_)

    @cached_property
    def special(self) -> np.ndarray:
        """[V] bool: the piece stands for no text ([PAD], [UNK], [CLS], [SEP], [MASK]), and is never predicted."""
        known = set(SPECIAL_TOKENS.values())
        known |= {added["content"] for added in self._state["added_tokens"] if added["special"]}
        return np.array([piece in known for piece in self.tokens], np.bool_)

    @property
    def lowercase(self) -> bool:
        return any(step.get("lowercase") or step.get("type") == "Lowercase" for step in self._normalization)

    @property
    def _normalization(self) -> list[dict[str, Any]]:
        normalizer = self._state.get("normalizer") or {}
        return normalizer.get("normalizers", [normalizer])

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal; equal for two tokenizers that give every text the same ids."""
        parts = {name: self._state.get(name) for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[list[int]]:
        """The ids of each text. With `add_special_tokens`, [CLS] text [SEP]. Nothing is cut."""
        encoded = self.backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encoded]

    def encode_with_spans(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The ids of each text, [T] int32, and where they stand in it, [T, 2] int32, without special tokens.

        A span is the token's first character (Unicode code point of the text as given) and the one after its last.
        """
        encoded = self.backend.encode_batch(texts, add_special_tokens=False)
        return [
            (np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int32).reshape(-1, 2))
            for encoding in encoded
        ]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Text from ids: pieces joined to words, and the space before punctuation taken out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def save(self, folder: str | Path) -> None:
        """Write the four files of the released format into `folder`, which is made if it is not there."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"), pretty=True)
        (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in self.tokens), encoding="utf-8")
        roles = {f"{role}_token": token for role, token in SPECIAL_TOKENS.items()}
        bert = next((step for step in self._normalization if step.get("type") == "BertNormalizer"), {})
        config = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": self.lowercase,
            "strip_accents": bert.get("strip_accents"),
            "tokenize_chinese_chars": bert.get("handle_chinese_chars", True),
            **roles,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "special_tokens_map.json").write_text(json.dumps(roles, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder or file in the released format.

    `tokenizer.json` is taken where there is one. From `vocab.txt` alone, BERT's normalisation and word splitting are
    put around it; whether to lower-case is read from `do_lower_case` of `tokenizer_config.json` beside it and,
    without that file, inferred: a vocabulary with an upper-case letter in a piece is cased.

    Raises:
        DataError: nothing of the kind there, or a vocabulary without one of the special tokens.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        for name in ("tokenizer.json", "vocab.txt"):
            if (path / name).is_file():
                return load_tokenizer(path / name)
        raise DataError(f"{path}: no tokenizer in this folder. Expected tokenizer.json or vocab.txt.")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file or folder. Expected a tokenizer's folder or its vocab.txt.")
    if path.suffix == ".json":
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises the bare class
            raise DataError(
                f"{path}: not a tokenizer.json that `tokenizers` {tokenizers.__version__} reads ({error})."
            ) from error
        backend.no_padding()
        backend.no_truncation()
        return Tokenizer(backend, str(path))
    vocabulary = _read_vocabulary(path)
    options = {}
    if (path.parent / "tokenizer_config.json").is_file():
        options = json.loads((path.parent / "tokenizer_config.json").read_text(encoding="utf-8"))
    lowercase = options.get("do_lower_case")
    if lowercase is None:
        lowercase = not any(piece != piece.lower() and piece not in SPECIAL_TOKENS.values() for piece in vocabulary)
    backend = _bert(
        models.WordPiece(vocabulary, unk_token=SPECIAL_TOKENS["unk"], max_input_chars_per_word=_LONGEST_WORD),
        lowercase=lowercase,
        strip_accents=options.get("strip_accents"),
        chinese=options.get("tokenize_chinese_chars", True),
    )
    _add_special_tokens(backend, [token for token in SPECIAL_TOKENS.values() if token in vocabulary])
    return Tokenizer(backend, str(path))


def train_wordpiece(
    documents: Iterable[Document],
    *,
    vocab_size: int = 30_522,
    lowercase: bool = True,
    min_frequency: int = 2,
    alphabet_limit: int = 1000,
    progress: ProgressCallback | None = None,
) -> Tokenizer:
    """Learn a WordPiece vocabulary from documents: the same documents always give the same one.

    The pieces are learnt by `tokenizers`' trainer, the one that stands behind the WordPiece vocabularies trained with
    the Hugging Face libraries: the most frequent pair of pieces is merged, again and again. Ids 0 to 4 are [PAD],
    [UNK], [CLS], [SEP], [MASK]; single characters follow, then the learnt pieces in the order of their learning.

    Args:
        documents: read twice (an iterator, which can be read once only, is kept in memory).
        vocab_size: the most pieces to keep, special tokens included; a small corpus may give fewer.
        lowercase: lower-case the text and strip accents, as the uncased models do.
        min_frequency: how often a pair must occur to be merged.
        alphabet_limit: the most different characters to keep, the most frequent first; words with another are [UNK].

    Raises:
        DataError: a vocabulary size that does not hold the special tokens and the alphabet.
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
    backend.train_from_iterator(_paragraphs(documents, report), trainer)
    model = models.WordPiece(
        backend.get_vocab(), unk_token=SPECIAL_TOKENS["unk"], max_input_chars_per_word=_LONGEST_WORD
    )
    trained = _bert(model, lowercase=lowercase)
    _add_special_tokens(trained, list(SPECIAL_TOKENS.values()))
    return Tokenizer(trained)


def _paragraphs(documents: Iterable[Document], report: Reporter) -> Iterator[list[str]]:
    characters = 0
    for document in documents:
        yield document.paragraphs()
        characters += len(document.text)
        report(characters / 1e6, None)
    report(characters / 1e6, None, final=True)


def _alphabet(documents: Iterable[Document], backend: tokenizers.Tokenizer, limit: int, report: Reporter) -> list[str]:
    """The most frequent characters of the normalised text, in the order of their code points."""
    raw = np.zeros(0x110000, np.int64)
    for paragraphs in _paragraphs(documents, report):
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
    """Whether the character can stand inside of a word: punctuation and Chinese characters are words of their own."""
    return len(backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(f"a{character}a"))) == 1


def _read_vocabulary(path: Path) -> dict[str, int]:
    try:
        pieces = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not a vocabulary: not UTF-8 at byte {error.start}. Expected one piece a line."
        ) from None
    vocabulary: dict[str, int] = {}
    for number, piece in enumerate(pieces):
        if piece in vocabulary:
            raise DataError(f"{path}, line {number + 1}: the piece {piece!r} is also on line {vocabulary[piece] + 1}.")
        vocabulary[piece] = number
    return vocabulary


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


def _add_special_tokens(backend: tokenizers.Tokenizer, tokens: list[str]) -> None:
    """Make the tokens whole and special, and have [CLS] A [SEP] B [SEP] put around what is encoded."""
    backend.add_special_tokens(tokens)
    cls, sep = SPECIAL_TOKENS["cls"], SPECIAL_TOKENS["sep"]
    if cls in tokens and sep in tokens:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{cls}:0 $A:0 {sep}:0",
            pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
            special_tokens=[(token, backend.token_to_id(token)) for token in (cls, sep)],
        )
