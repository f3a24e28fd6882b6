"""Subword tokenizers for translation: SentencePiece (unigram, BPE) and BPE within words; `pairs_training` trains them.

A `PairTokenizer` consists of a source and a target side, which are the same object if the vocabulary is joint, and of
the preparation of texts: lower-casing, and the Moses tokeniser's normalisation and word splitting. Its folder is part
of a model's checkpoint folder:

    subwords.json             kind, whether joint, the languages, lower-casing, Moses
    tokenizer_config.json     settings for the reference implementation
    source.spm, target.spm    SentencePiece, in the format of released Marian models, with
    vocab.json                the ids of the source's pieces, or of both sides', and target_vocab.json where they differ
    tokenizer.json            or BPE within words (`tokenizers`), joint; else source.json and target.json

The tokenizer of a text-to-text model (kind `text`) is the folder of an ordinary one, see `loading`, and subwords.json.

transformers' AutoTokenizer loads a folder with SentencePiece's files, or with tokenizer.json, to the same ids; texts
must be lower-cased and split into words beforehand where that applies. A released Marian folder loads here without
subwords.json: its subwords are SentencePiece's, with the ids of vocab.json.

Subword regularisation (`segmentation`) samples a new segmentation of a text each time, a pure function of (seed, epoch,
index). Since a subword never crosses a space, words are sampled separately.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np

from ..errors import DataError
from ..json_files import expect, read_object, value_of, write_json
from ..packing import ranges
from .kinds import PairKind
from .loading import load_tokenizer
from .segmentation import banked, merge, mixed, segmentations, walk
from .text_side import TextSide
from .tokenizer import Tokenizer

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
SPACE = "▁"
WORD_END = "</w>"
_NO_LIMIT = 10**6  # the reference implementation writes 10^30 for no maximum length
TEXT = "text"  # kind of a text-to-text model's
_CONFIG = "subwords.json"
_REFERENCE_CONFIG = "tokenizer_config.json"
_LONGEST = "model_max_length"


class Side(Protocol):
    """Subwords of one language. `size` is their number; the ids are those of special tokens, `bos_id` may be None."""

    size: int
    pad_id: int
    bos_id: int | None
    eos_id: int
    unk_id: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; special tokens except the unknown token are dropped."""
        ...

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the subword of each id, including special tokens."""
        ...

    def words(self, text: str) -> list[str]:
        """Split a text into the words that `draw` takes; no subword crosses from one to the next."""
        ...

    def draw(self, word: str, number: int, amount: float, key: tuple[int, ...]) -> list[int]:
        """Sample a segmentation of a word. `number` is uniform in 64 bits; `amount` is alpha, or the merge dropout."""
        ...

    def save(self, path: Path) -> None:
        """Write the side's file; `path` is its name without the ending."""
        ...

    @property
    def vocabulary(self) -> dict[str, int]:
        """Return the id of each subword."""
        ...

    @property
    def state(self) -> bytes:
        """Return everything that determines the ids, for hashing."""
        ...


@dataclass(frozen=True)
class TextForm:
    """Preparation of a text before it is split into subwords, undone afterwards.

    `prefix` stands before every source, as T5's names of tasks do. `lowercase` is not undone. `moses` normalises
    punctuation and splits words as the Moses scripts do, in the order of
    Multi30k's own files (lower-cased, normalised, split), with sacremoses; a translation is detokenised.
    """

    languages: tuple[str, str] = ("en", "de")
    lowercase: bool = False
    moses: bool = False
    prefix: str = field(default="", repr=False)  # no tokenizer is trained with one

    def prepare(self, text: str, target: bool) -> str:
        """Return the text to split into subwords."""
        if self.lowercase:
            text = text.lower()
        if self.moses:
            normalizer, tokenizer, _ = self._moses[target]
            text = tokenizer.tokenize(normalizer.normalize(text), return_str=True, escape=False)
        return text if target else self.prefix + text

    def finish(self, text: str) -> str:
        """Turn a prepared target text back into running text."""
        return self._moses[1][2].detokenize(text.split(" ")) if self.moses else text

    @cached_property
    def _moses(self) -> list[tuple[Any, Any, Any]]:
        import sacremoses

        return [
            (
                sacremoses.MosesPunctNormalizer(language),
                sacremoses.MosesTokenizer(language),
                sacremoses.MosesDetokenizer(language),
            )
            for language in self.languages
        ]


class PairTokenizer:
    """Tokenizer of both sides of a translation, with the preparation of their texts.

    Attributes:
        longest: maximum length of a text in the model's training, in tokens, end token included; None if unknown.
    """

    def __init__(self, kind: str, source: Side, target: Side, form: TextForm, longest: int | None = None):
        self.kind, self.source, self.target, self.form, self.longest = kind, source, target, form, longest

    def with_longest(self, longest: int) -> PairTokenizer:
        """Return a copy for a model that was trained on texts of at most `longest` tokens."""
        return PairTokenizer(self.kind, self.source, self.target, self.form, longest)

    def with_padding_last(self) -> PairTokenizer:
        """Return a copy whose padding, the first id, is the last, and every other id the one before it, as Marian's."""
        source = _padding_last(self.source)
        target = source if self.source is self.target else _padding_last(self.target)
        return PairTokenizer(self.kind, source, target, self.form, self.longest)

    @property
    def can_have_padding_last(self) -> bool:
        """Whether the ids are those of SentencePiece models whose first is padding."""
        return all(isinstance(side, SentencePieceSide) and side.pad_id == 0 for side in (self.source, self.target))

    def with_prefix(self, prefix: str) -> PairTokenizer:
        """Return a copy that puts a text before every source."""
        form = replace(self.form, prefix=prefix)
        return PairTokenizer(self.kind, self.source, self.target, form, self.longest)

    @property
    def joint(self) -> bool:
        """Whether both sides share one vocabulary."""
        return self.source is self.target or self.source.vocabulary == self.target.vocabulary

    def language_code(self, text: str) -> str:
        """Return the language code at the start of a source text, which each part of it needs; empty if none."""
        return language_code(text) if self.kind == "marian" else ""

    def encode_source(self, texts: Iterable[str]) -> list[list[int]]:
        """Return the ids of source texts, without special tokens."""
        return self.source.encode([self.form.prepare(text, target=False) for text in texts])

    def encode_target(self, texts: Iterable[str]) -> list[list[int]]:
        """Return the ids of target texts, without special tokens."""
        return self.target.encode([self.form.prepare(text, target=True) for text in texts])

    def decode_prepared(self, ids: Sequence[int]) -> str:
        """Return the target text in its prepared form (with `moses`, split into words), for tokenised BLEU."""
        return self.target.decode(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the running target text of ids."""
        return self.form.finish(self.target.decode(ids))

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal; equal for tokenizers that give every text the same ids."""
        form = {name: value for name, value in asdict(self.form).items() if name != "prefix" or value}
        digest = hashlib.sha256(json.dumps([self.kind, form]).encode())
        for side in (self.source, self.target):
            digest.update(side.state)
        return digest.hexdigest()[:32]

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files to `folder`, which is created if missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        words = self.kind == "word-bpe"
        if self.kind == TEXT:
            self.source.save(folder / "tokenizer")
            self._save_form(folder)
            if self.longest is not None:
                path = folder / _REFERENCE_CONFIG
                write_json(path, {**read_object(path), _LONGEST: self.longest}, ensure_ascii=False)
            return
        if words and self.joint:
            self.source.save(folder / "tokenizer")
        else:
            self.source.save(folder / "source")
            self.target.save(folder / "target")
        if not words:
            write_json(folder / "vocab.json", self.source.vocabulary, ensure_ascii=False)
            if not self.joint:
                write_json(folder / "target_vocab.json", self.target.vocabulary, ensure_ascii=False)
        source, target = self.form.languages
        reference = {
            "tokenizer_class": "PreTrainedTokenizerFast" if words else "MarianTokenizer",
            **{f"{role}_token": piece for role, piece in (("pad", PAD), ("eos", EOS), ("unk", UNK))},
            **({} if words else {"source_lang": source, "target_lang": target, "separate_vocabs": not self.joint}),
            **({} if self.longest is None else {_LONGEST: self.longest}),
        }
        write_json(folder / _REFERENCE_CONFIG, reference, ensure_ascii=False)
        if self.kind != "marian":
            self._save_form(folder)

    def _save_form(self, folder: Path) -> None:
        form = {"kind": self.kind, "joint": self.joint, **asdict(self.form)}
        write_json(folder / _CONFIG, form, ensure_ascii=False)


class SentencePieceSide:
    """One side with a SentencePiece model. A model without a padding token gets one after its last id."""

    def __init__(self, model: bytes, where: str = "the SentencePiece model"):
        import sentencepiece

        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError) as error:
            raise DataError(f"{where}: not a SentencePiece model ({error}).") from None
        self.state, sp = model, self.processor
        self.size = sp.get_piece_size() + (sp.pad_id() < 0)
        self.pad_id = sp.pad_id() if sp.pad_id() >= 0 else sp.get_piece_size()
        self.bos_id: int | None = sp.bos_id() if sp.bos_id() >= 0 else None
        self.eos_id, self.unk_id = sp.eos_id(), sp.unk_id()
        if self.eos_id < 0:
            raise DataError(f"{where}: no end-of-sentence token (eos_id -1), which decoding needs to stop.")
        self._special = {self.pad_id, self.bos_id, self.eos_id}
        self._drawn: dict[Any, Any] = {}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.processor.encode(list(texts))

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.decode([i for i in map(int, ids) if i not in self._special])

    def pieces(self, ids: Sequence[int]) -> list[str]:
        count = self.processor.get_piece_size()
        return [self.processor.id_to_piece(i) if i < count else PAD for i in map(int, ids)]

    def words(self, text: str) -> list[str]:
        normal = self.processor.normalize(text)
        return [SPACE + word for word in normal.split(SPACE) if word]

    def draw(self, word: str, number: int, amount: float, key: tuple[int, ...]) -> list[int]:
        if self.unigram:
            lattice = self._drawn.get((word, amount))
            if lattice is None:
                longest, unknown = self._bounds
                self._drawn[word, amount] = lattice = segmentations(
                    word, self._pieces, longest, (self.unk_id, unknown), amount
                )
            return self._joined(walk(lattice, number))
        return banked(self._drawn, word, number, amount, key, self._merge)

    def save(self, path: Path) -> None:
        path.with_name(f"{path.name}.spm").write_bytes(self.state)

    @property
    def vocabulary(self) -> dict[str, int]:
        pieces = {self.processor.id_to_piece(i): i for i in range(self.processor.get_piece_size())}
        return pieces if self.pad_id < len(pieces) else pieces | {PAD: self.pad_id}

    @cached_property
    def _pieces(self) -> dict[str, tuple[int, float]]:
        sp = self.processor
        unusable = (sp.is_control, sp.is_unknown, sp.is_unused)
        usable = (i for i in range(sp.get_piece_size()) if not any(test(i) for test in unusable))
        pieces = {sp.id_to_piece(i): (i, sp.get_score(i)) for i in usable}
        crossing = next((piece for piece in pieces if SPACE in piece[1:]), None)
        if crossing is not None:
            raise DataError(
                f"The SentencePiece model has subwords that cross spaces ({crossing!r}), so they cannot be sampled."
            )
        return pieces

    @cached_property
    def unigram(self) -> bool:
        """Whether this is a unigram model, whose subwords have probabilities; else it is BPE."""
        try:
            self.processor.nbest_encode("a", nbest_size=2)
        except RuntimeError:
            return False
        return True

    @cached_property
    def _bounds(self) -> tuple[int, float]:
        """Length of the longest subword, in characters, and the library's score of an unknown character."""
        return max(map(len, self._pieces)), min(score for _, score in self._pieces.values()) - 10.0

    def _merge(self, word: str, dropout: float, draw: Iterator[float]) -> list[int]:
        pieces = self._pieces

        def rank(left: str, right: str) -> float | None:
            found = pieces.get(left + right)
            return None if found is None else -found[1]

        merged = merge(list(word), rank, dropout, draw)
        return self._joined([pieces[piece][0] if piece in pieces else self.unk_id for piece in merged])

    def _joined(self, ids: list[int]) -> list[int]:
        """Merge consecutive unknown tokens into one, as the library does."""
        return [i for i, before in zip(ids, [None, *ids], strict=False) if i != self.unk_id or i != before]


class MarianSide:
    """One side of a released Marian folder: subwords by SentencePiece, ids by a vocabulary file.

    A language code at the start of a text, such as `>>fra<<`, is one token. Decoded text has no unknown tokens.
    """

    def __init__(self, model: bytes, vocabulary: dict[str, int], where: str):
        self._pieces = SentencePieceSide(model, where)
        self.vocabulary = vocabulary
        missing = [piece for piece in (PAD, EOS, UNK) if piece not in vocabulary]
        if missing:
            raise DataError(f"{where}: the vocabulary has no {', '.join(missing)}, which Marian's has.")
        self.size = max(vocabulary.values()) + 1
        self.pad_id, self.eos_id, self.unk_id = (vocabulary[piece] for piece in (PAD, EOS, UNK))
        self.bos_id: int | None = None
        self._tokens = {number: piece for piece, number in vocabulary.items()}
        self.state = model + json.dumps(vocabulary, sort_keys=True).encode()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        codes = [language_code(text) for text in texts]
        rests = [text[len(code) :] for text, code in zip(texts, codes, strict=True)]
        pieces = self._pieces.processor.encode(rests, out_type=str)
        return [self._ids([code, *rest] if code else rest) for code, rest in zip(codes, pieces, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        special = (self.pad_id, self.eos_id, self.unk_id)
        kept = [self._tokens[i] for i in map(int, ids) if i in self._tokens and i not in special]
        return self._pieces.processor.decode_pieces(kept).replace(SPACE, " ").strip()  # joins the bytes of a character

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self._tokens.get(int(i), UNK) for i in ids]

    def words(self, text: str) -> list[str]:
        return self._pieces.words(text)

    def draw(self, word: str, number: int, amount: float, key: tuple[int, ...]) -> list[int]:
        if language_code(word.removeprefix(SPACE)):
            return self.encode([word.removeprefix(SPACE)])[0]
        return self._ids(map(self._pieces.processor.id_to_piece, self._pieces.draw(word, number, amount, key)))

    def save(self, path: Path) -> None:
        path.with_name(f"{path.name}.spm").write_bytes(self._pieces.state)

    def _ids(self, pieces: Iterable[str]) -> list[int]:
        return [self.vocabulary.get(piece, self.unk_id) for piece in pieces]


def _padding_last(side: Side) -> MarianSide:
    count = len(side.vocabulary)
    ids = {piece: (number - 1) % count for piece, number in side.vocabulary.items()}
    return MarianSide(side.state, dict(sorted(ids.items(), key=lambda item: item[1])), "the tokenizer")


def language_code(text: str) -> str:
    """Return the target language code at the start of a Marian model's source text; empty if there is none."""
    end = text.find("<<")
    return text[: end + 2] if text.startswith(">>") and end >= 0 else ""


class WordBpeSide:
    """One side with BPE within space-separated words (Sennrich et al. 2016), by the `tokenizers` library."""

    def __init__(self, backend: Any, where: str = "the tokenizer"):
        self.backend = backend
        content = json.loads(backend.to_str())
        if content["model"].get("type") != "BPE" or content["model"].get("end_of_word_suffix") != WORD_END:
            raise DataError(
                f"{where}: expected a BPE whose words end in {WORD_END}, as `--subwords word-bpe` trains it."
            )
        self.state = json.dumps(content, sort_keys=True).encode()
        self.size = backend.get_vocab_size()
        vocabulary = backend.get_vocab()
        missing = [piece for piece in (PAD, BOS, EOS, UNK) if piece not in vocabulary]
        if missing:
            raise DataError(f"{where}: the vocabulary has no {', '.join(missing)}.")
        self.pad_id, self.eos_id, self.unk_id = (vocabulary[piece] for piece in (PAD, EOS, UNK))
        self.bos_id: int | None = vocabulary[BOS]
        self.vocabulary = vocabulary
        self._ranks = {tuple(pair): rank for rank, pair in enumerate(content["model"]["merges"])}
        self._drawn: dict[Any, Any] = {}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        special = (self.pad_id, self.bos_id, self.eos_id)
        kept = [i for i in map(int, ids) if i not in special]
        return self.backend.decode(kept, skip_special_tokens=False).strip()

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self.backend.id_to_token(int(i)) or UNK for i in ids]

    def words(self, text: str) -> list[str]:
        return text.split()

    def draw(self, word: str, number: int, amount: float, key: tuple[int, ...]) -> list[int]:
        return banked(self._drawn, word, number, amount, key, self._merge)

    def save(self, path: Path) -> None:
        self.backend.save(str(path.with_name(f"{path.name}.json")), pretty=True)

    def _merge(self, word: str, dropout: float, draw: Iterator[float]) -> list[int]:
        symbols = [*word[:-1], word[-1] + WORD_END]
        pieces = merge(symbols, lambda left, right: self._ranks.get((left, right)), dropout, draw)
        return [self.vocabulary.get(piece, self.unk_id) for piece in pieces]


def sample(
    side: Side, texts: Iterable[str], amount: float, *, seed: int, epoch: int, indexes: Iterable[int], role: int
) -> list[list[int]]:
    """Return the ids of each prepared text, with sampled segmentations.

    Args:
        side: the tokenizer of one side.
        texts: prepared texts.
        amount: alpha of a unigram model, or the merge dropout of BPE.
        seed: random seed.
        epoch: number of the epoch.
        indexes: index of each text; with `seed` and `epoch`, it determines the segmentation.
        role: 0 for the source, 1 for the target, so that equal words on both sides are sampled independently.
    """
    split = [side.words(text) for text in texts]
    counts = np.array([len(words) for words in split], np.int64)
    places = ranges(np.zeros(len(split), np.int64), counts)
    numbers = iter(mixed(seed, role, epoch, np.repeat(np.fromiter(indexes, np.int64), counts), places).tolist())
    result = []
    for words in split:
        ids: list[int] = []
        for word in words:
            ids += side.draw(word, next(numbers), amount, (seed, role, epoch))
        result.append(ids)
    return result


def text_pairs(tokenizer: Tokenizer, form: TextForm | None = None, where: str = "the tokenizer") -> PairTokenizer:
    """Return an ordinary tokenizer as that of both sides.

    Raises:
        DataError: it lacks special tokens.
    """
    side = TextSide(tokenizer, where)
    longest = tokenizer.settings.get(_LONGEST)
    known = isinstance(longest, int) and 1 < longest < _NO_LIMIT
    return PairTokenizer(TEXT, side, side, form or TextForm(), longest if known else None)


# --- training ---------------------------------------------------------------------------------------------------------


def load_subwords(path: str | Path, form: TextForm | None = None) -> PairTokenizer:
    """Load the tokenizer of a folder, or of one SentencePiece model file for both sides.

    Args:
        path: a folder written by `PairTokenizer.save` or in Marian's released format; or an .spm or .model file.
        form: preparation of texts, for a model file, which does not specify it.

    Raises:
        DataError: there is no such tokenizer.
    """
    path = Path(path).expanduser()
    if path.is_file():
        side = SentencePieceSide(path.read_bytes(), str(path))
        return PairTokenizer("unigram" if side.unigram else "bpe", side, side, form or TextForm())
    reference = _read_reference_config(path / _REFERENCE_CONFIG)
    if (path / _CONFIG).is_file():
        kind, joint, found = _read_form(path / _CONFIG)
        if kind == TEXT:
            return text_pairs(load_tokenizer(path), found, str(path))
        if joint:
            side = _load_side(path / ("tokenizer.json" if kind == "word-bpe" else "source.spm"), "vocab.json")
            return PairTokenizer(kind, side, side, found, _longest(reference))
        ending = "json" if kind == "word-bpe" else "spm"
        ids = ("vocab.json", "target_vocab.json")
        names = zip(("source", "target"), ids, strict=True)
        sides = [_load_side(path / f"{name}.{ending}", its_ids) for name, its_ids in names]
        return PairTokenizer(kind, sides[0], sides[1], found, _longest(reference))
    if (path / "source.spm").is_file() and (path / "vocab.json").is_file():
        return _load_marian(path, form, reference)
    if not path.is_dir() or path.suffix == ".spm":
        raise DataError(
            f"{path}: there is no such file or folder. Expected the folder of a tokenizer, or an .spm file."
        )
    return text_pairs(load_tokenizer(path), form, str(path))


def _read_form(path: Path) -> tuple[str, bool, TextForm]:
    """Read subwords.json: kind, whether joint, preparation of texts."""
    content, where = read_object(path), str(path)
    kind, joint = value_of(content, "kind", str, where), value_of(content, "joint", bool, where)
    if kind not in (*get_args(PairKind), TEXT):
        raise DataError(f"{path}: kind: expected one of {', '.join(get_args(PairKind))}, {TEXT}, found {kind!r}.")
    languages = value_of(content, "languages", list[str], where)
    prefix = value_of(content, "prefix", str, where, "")
    other = {"kind", "joint", "languages", "prefix"}
    switches = {name: value_of(content, name, bool, where) for name in content.keys() - other}
    known = {field.name for field in fields(TextForm)}
    unknown = switches.keys() - known
    if unknown or len(languages) != 2:
        wrong = f"unknown {', '.join(sorted(unknown))}" if unknown else f"{len(languages)} languages, expected 2"
        raise DataError(f"{path}: not in the format that bestiary writes ({wrong}).")
    return kind, joint, TextForm(**switches, languages=(languages[0], languages[1]), prefix=prefix)


def _load_side(path: Path, ids: str) -> Side:
    """Read a side's file; `ids` is the name of that with the ids, if they are not those of the SentencePiece model."""
    if not path.is_file():
        raise DataError(f"{path}: this file of the tokenizer is missing.")
    if path.suffix != ".json":
        side, own = SentencePieceSide(path.read_bytes(), str(path)), path.with_name(ids)
        vocabulary = _read_ids(own) if own.is_file() else side.vocabulary
        return side if vocabulary == side.vocabulary else MarianSide(side.state, vocabulary, str(path))
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises the bare class
        raise DataError(f"{path}: not a tokenizer.json that `tokenizers` reads ({error}).") from error
    return WordBpeSide(backend, str(path))


def _read_reference_config(path: Path) -> dict[str, Any]:
    """Read tokenizer_config.json, if it exists."""
    return read_object(path) if path.is_file() else {}


def _longest(reference: dict[str, Any]) -> int | None:
    """Return the maximum length in tokenizer_config.json; None if it is not a number of tokens."""
    found = reference.get(_LONGEST)
    return found if isinstance(found, int) and found > 1 else None


def _read_ids(path: Path) -> dict[str, int]:
    return expect(read_object(path), dict[str, int], str(path))


def _load_marian(path: Path, form: TextForm | None, reference: dict[str, Any]) -> PairTokenizer:
    vocabulary = _read_ids(path / "vocab.json")
    own = path / "target_vocab.json"
    target_vocabulary = _read_ids(own) if own.is_file() else vocabulary
    form = form or TextForm()
    names = (reference.get("source_lang"), reference.get("target_lang"))
    form = replace(form, languages=tuple(a or b for a, b in zip(names, form.languages, strict=True)))
    source, target = (
        MarianSide((path / f"{name}.spm").read_bytes(), ids, str(path / f"{name}.spm"))
        for name, ids in (("source", vocabulary), ("target", target_vocabulary))
    )
    return PairTokenizer("marian", source, target, form, _longest(reference))
