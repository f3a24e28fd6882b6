"""Subword tokenizers for translation, trained here or loaded: SentencePiece (unigram, BPE) and BPE over words.

A `PairTokenizer` holds a source and a target side, which are one and the same where the vocabulary is joint, and what
is done to a text before it is cut up: lower-casing, and the Moses tokeniser's normalisation and word splitting. Its
folder is part of a model's checkpoint folder:

    subwords.json             kind, whether joint, the languages, lower-casing, Moses
    tokenizer_config.json     what the reference implementation asks for
    source.spm, target.spm    SentencePiece, in the format of released Marian models, with
    vocab.json                the ids of the source's pieces, or of both sides', and target_vocab.json where they differ
    tokenizer.json            or BPE over words (`tokenizers`), joint; else source.json and target.json

transformers' AutoTokenizer loads a folder with SentencePiece's files, or with tokenizer.json, to the same ids; a text
that is to be lower-cased or split into words must be so before. A released Marian folder loads here without
subwords.json: its pieces are SentencePiece's, their ids those of vocab.json.

Subword regularisation (`segmentation`) gives a text another segmentation each time, a pure function of (seed, epoch,
index). Since a piece never crosses a space, words are drawn one by one.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from ..errors import DataError
from ..packing import ranges
from .segmentation import banked, merge, mixed, segmentations, walk

Kind = Literal["unigram", "bpe", "word-bpe"]
PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
SPACE = "▁"
WORD_END = "</w>"
_CONFIG = "subwords.json"
_REFERENCE_CONFIG = "tokenizer_config.json"
_LONGEST = "model_max_length"


class Side(Protocol):
    """The pieces of one language. `size` counts them; the ids are those of the special ones, `bos_id` may be None."""

    size: int
    pad_id: int
    bos_id: int | None
    eos_id: int
    unk_id: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without the special ones."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special ones but the unknown are left out."""
        ...

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each id's piece, special ones too."""
        ...

    def words(self, text: str) -> list[str]:
        """What `draw` takes: no piece crosses from one to the next."""
        ...

    def draw(self, word: str, number: int, amount: float, key: tuple[int, ...]) -> list[int]:
        """A segmentation of a word. `number` is uniform in 64 bits; `amount` is alpha, or the dropout of merges."""
        ...

    def save(self, path: Path) -> None:
        """Write the file that `path`, without its ending, names."""
        ...

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of each piece."""
        ...

    @property
    def state(self) -> bytes:
        """What decides the ids, to be hashed."""
        ...


@dataclass(frozen=True)
class TextForm:
    """What is done to a text before it is cut into pieces, and undone after.

    `lowercase` is not undone. `moses` normalises punctuation and splits words as the Moses scripts do, in the order of
    Multi30k's own files (lower-cased, normalised, split), by sacremoses; a translation is joined again.
    """

    languages: tuple[str, str] = ("en", "de")
    lowercase: bool = False
    moses: bool = False

    def prepare(self, text: str, target: bool) -> str:
        """The text that is cut into pieces."""
        if self.lowercase:
            text = text.lower()
        if self.moses:
            normalizer, tokenizer, _ = self._moses[target]
            text = tokenizer.tokenize(normalizer.normalize(text), return_str=True, escape=False)
        return text

    def finish(self, text: str) -> str:
        """Running text of a prepared target text."""
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
    """The two sides of a translation, and the form that their texts are brought into.

    Attributes:
        longest: most tokens of a text, its end among them, that the model was trained on; None where nobody said.
    """

    def __init__(self, kind: str, source: Side, target: Side, form: TextForm, longest: int | None = None):
        self.kind, self.source, self.target, self.form, self.longest = kind, source, target, form, longest

    def with_longest(self, longest: int) -> PairTokenizer:
        """The same for a model that was trained on texts of at most so many tokens."""
        return PairTokenizer(self.kind, self.source, self.target, self.form, longest)

    @property
    def joint(self) -> bool:
        """Whether both sides have one vocabulary."""
        return self.source is self.target or self.source.vocabulary == self.target.vocabulary

    def language_code(self, text: str) -> str:
        """The code at the start of a source text that every part of it needs; empty if there is none."""
        return language_code(text) if self.kind == "marian" else ""

    def encode_source(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of source texts, without special ones."""
        return self.source.encode([self.form.prepare(text, target=False) for text in texts])

    def encode_target(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of target texts, without special ones."""
        return self.target.encode([self.form.prepare(text, target=True) for text in texts])

    def decode_prepared(self, ids: Sequence[int]) -> str:
        """The target text in its prepared form (split into words with `moses`), which tokenised BLEU compares."""
        return self.target.decode(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Running target text of ids."""
        return self.form.finish(self.target.decode(ids))

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal; equal for two that give every text the same ids."""
        digest = hashlib.sha256(json.dumps([self.kind, asdict(self.form)]).encode())
        for side in (self.source, self.target):
            digest.update(side.state)
        return digest.hexdigest()[:32]

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into `folder`, which is made if it is not there."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        words = self.kind == "word-bpe"
        if words and self.joint:
            self.source.save(folder / "tokenizer")
        else:
            self.source.save(folder / "source")
            self.target.save(folder / "target")
        if not words:
            _write_json(folder / "vocab.json", self.source.vocabulary)
            if not self.joint:
                _write_json(folder / "target_vocab.json", self.target.vocabulary)
        source, target = self.form.languages
        reference = {
            "tokenizer_class": "PreTrainedTokenizerFast" if words else "MarianTokenizer",
            **{f"{role}_token": piece for role, piece in (("pad", PAD), ("eos", EOS), ("unk", UNK))},
            **({} if words else {"source_lang": source, "target_lang": target, "separate_vocabs": not self.joint}),
            **({} if self.longest is None else {_LONGEST: self.longest}),
        }
        _write_json(folder / _REFERENCE_CONFIG, reference)
        if self.kind != "marian":
            _write_json(folder / _CONFIG, {"kind": self.kind, "joint": self.joint, **asdict(self.form)})


class SentencePieceSide:
    """One side by a SentencePiece model. A model without a padding piece gets one after its last."""

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
            raise DataError(f"{where}: it has no end-of-sentence piece (eos_id -1), which decoding stops at.")
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
                f"The SentencePiece model has pieces that cross spaces ({crossing!r}): it cannot be sampled from."
            )
        return pieces

    @cached_property
    def unigram(self) -> bool:
        """Whether the pieces have probabilities of a unigram model; else they are BPE's."""
        try:
            self.processor.nbest_encode("a", nbest_size=2)
        except RuntimeError:
            return False
        return True

    @cached_property
    def _bounds(self) -> tuple[int, float]:
        """Characters of the longest piece, and the score of an unknown character, which is the library's."""
        return max(map(len, self._pieces)), min(score for _, score in self._pieces.values()) - 10.0

    def _merge(self, word: str, dropout: float, draw: Iterator[float]) -> list[int]:
        pieces = self._pieces

        def rank(left: str, right: str) -> float | None:
            found = pieces.get(left + right)
            return None if found is None else -found[1]

        merged = merge(list(word), rank, dropout, draw)
        return self._joined([pieces[piece][0] if piece in pieces else self.unk_id for piece in merged])

    def _joined(self, ids: list[int]) -> list[int]:
        """One unknown piece for several in turn, as the library has it."""
        return [i for i, before in zip(ids, [None, *ids], strict=False) if i != self.unk_id or i != before]


class MarianSide:
    """One side of a released Marian folder: pieces by SentencePiece, ids by a vocabulary file.

    A language code at the start of a text, as `>>fra<<`, is one token. Decoded text has no unknown tokens.
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


def language_code(text: str) -> str:
    """The code at the start of a Marian model's source text that names the language to translate to, or nothing."""
    end = text.find("<<")
    return text[: end + 2] if text.startswith(">>") and end >= 0 else ""


class WordBpeSide:
    """One side by BPE within words that spaces part (Sennrich et al. 2016), of the `tokenizers` library."""

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
    """Ids of each prepared text, cut up at random.

    Args:
        side: the tokenizer.
        texts: prepared texts.
        amount: alpha of a unigram model, or the dropout of a BPE.
        seed, epoch: with each text's index, what decides.
        indexes: of the texts.
        role: 0 for the source, 1 for the target, so that equal words on both sides are cut up independently.
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


# --- training ---------------------------------------------------------------------------------------------------------


def train_subwords(
    kind: Kind,
    source: Callable[[], Iterable[str]],
    target: Callable[[], Iterable[str]],
    *,
    vocab_size: int,
    joint: bool,
    form: TextForm,
    split_digits: bool = False,
) -> PairTokenizer:
    """Learn the pieces; the same text always gives the same ones.

    Args:
        kind: `unigram` or `bpe` of SentencePiece, or `word-bpe`, the merges within words of `tokenizers`.
        source, target: give the prepared texts, anew at each call.
        vocab_size: pieces, the four special ones counted in; of each side where they are separate. A small text may
            give fewer.
        joint: one vocabulary for both sides.
        form: how the texts were prepared.
        split_digits: make every digit a piece of its own; SentencePiece only.

    Raises:
        DataError: a vocabulary that does not hold the text's characters.
    """
    if kind == "word-bpe" and split_digits:
        raise DataError("BPE within words cannot keep digits apart; take SentencePiece's pieces for that.")
    train = _train_word_bpe if kind == "word-bpe" else partial(_train_sentencepiece, split_digits=split_digits)

    def both() -> Iterator[str]:
        yield from source()
        yield from target()

    if joint:
        side = train(kind, both, vocab_size)
        return PairTokenizer(kind, side, side, form)
    return PairTokenizer(kind, train(kind, source, vocab_size), train(kind, target, vocab_size), form)


def _train_sentencepiece(kind: str, texts: Callable[[], Iterable[str]], vocab_size: int, *, split_digits: bool) -> Side:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts()),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=kind,
            character_coverage=1.0,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            hard_vocab_limit=False,
            split_digits=split_digits,
            num_threads=16,  # the sums depend on their number, so that it is a fixed one
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(f"SentencePiece cannot learn {vocab_size} pieces from this text: {error}") from None
    return SentencePieceSide(model.getvalue())


def _train_word_bpe(_: str, texts: Callable[[], Iterable[str]], vocab_size: int) -> Side:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    characters, last = set(), set()
    for text in texts():
        for word in text.split():
            characters.update(word)
            last.add(word[-1] + WORD_END)
    # Named as special tokens the characters have their ids before the trainer starts, whose own numbering of them
    # follows a hash table, another one in each process.
    given = [PAD, BOS, EOS, UNK, *sorted(characters), *sorted(last)]
    if vocab_size <= len(given):
        raise DataError(
            f"A vocabulary of {vocab_size} pieces: too small. The four special ones and the text's characters, inside "
            f"of words and at their ends, take {len(given)}."
        )
    backend = tokenizers.Tokenizer(models.BPE(unk_token=UNK, end_of_word_suffix=WORD_END))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=given,
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    backend.train_from_iterator(texts(), trainer)
    # Made again with its vocabulary alone: here the characters are pieces like any other.
    content = json.loads(backend.to_str())["model"]
    merges = [tuple(pair) for pair in content["merges"]]
    trained = tokenizers.Tokenizer(models.BPE(content["vocab"], merges, unk_token=UNK, end_of_word_suffix=WORD_END))
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trained.decoder = decoders.BPEDecoder(suffix=WORD_END)
    trained.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, trained.token_to_id(EOS))]
    )
    return WordBpeSide(trained)


# --- loading ----------------------------------------------------------------------------------------------------------


def load_subwords(path: str | Path, form: TextForm | None = None) -> PairTokenizer:
    """The tokenizer of a folder, or of one SentencePiece model file for both sides.

    Args:
        path: a folder as `PairTokenizer.save` writes it or in Marian's released format; or an .spm or .model file.
        form: of a model file, which does not say it.

    Raises:
        DataError: nothing of the kind there.
    """
    path = Path(path).expanduser()
    if path.is_file():
        side = SentencePieceSide(path.read_bytes(), str(path))
        return PairTokenizer("unigram" if side.unigram else "bpe", side, side, form or TextForm())
    reference = _read_reference_config(path / _REFERENCE_CONFIG)
    if (path / _CONFIG).is_file():
        content = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
        try:
            kind, joint = content.pop("kind"), content.pop("joint")
            found = TextForm(**{**content, "languages": tuple(content["languages"])})
        except (KeyError, TypeError) as error:
            raise DataError(f"{path / _CONFIG}: not as this program writes it ({error}).") from None
        if joint:
            side = _load_side(path / ("tokenizer.json" if kind == "word-bpe" else "source.spm"))
            return PairTokenizer(kind, side, side, found, _longest(reference))
        ending = "json" if kind == "word-bpe" else "spm"
        sides = [_load_side(path / f"{name}.{ending}") for name in ("source", "target")]
        return PairTokenizer(kind, sides[0], sides[1], found, _longest(reference))
    if (path / "source.spm").is_file() and (path / "vocab.json").is_file():
        return _load_marian(path, form, reference)
    raise DataError(
        f"{path}: no tokenizer for translation there. Expected {_CONFIG}, or source.spm, target.spm and vocab.json."
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _load_side(path: Path) -> Side:
    if not path.is_file():
        raise DataError(f"{path}: this file of the tokenizer is missing.")
    if path.suffix != ".json":
        return SentencePieceSide(path.read_bytes(), str(path))
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises the bare class
        raise DataError(f"{path}: not a tokenizer.json that `tokenizers` reads ({error}).") from error
    return WordBpeSide(backend, str(path))


def _read_reference_config(path: Path) -> dict[str, Any]:
    """What tokenizer_config.json says, if it is there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _longest(reference: dict[str, Any]) -> int | None:
    """The longest text by tokenizer_config.json; other things than a number of tokens stand for none there."""
    found = reference.get(_LONGEST)
    return found if isinstance(found, int) and found > 1 else None


def _load_marian(path: Path, form: TextForm | None, reference: dict[str, Any]) -> PairTokenizer:
    vocabulary = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
    own = path / "target_vocab.json"
    target_vocabulary = json.loads(own.read_text(encoding="utf-8")) if own.is_file() else vocabulary
    form = form or TextForm()
    names = (reference.get("source_lang"), reference.get("target_lang"))
    form = replace(form, languages=tuple(a or b for a, b in zip(names, form.languages, strict=True)))
    source, target = (
        MarianSide((path / f"{name}.spm").read_bytes(), ids, str(path / f"{name}.spm"))
        for name, ids in (("source", vocabulary), ("target", target_vocabulary))
    )
    return PairTokenizer("marian", source, target, form, _longest(reference))
