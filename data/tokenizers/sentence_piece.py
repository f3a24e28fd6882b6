"""SentencePiece's unigram and BPE pieces (ALBERT, T5, XLM-R): ▁ is the space before a word.

Kudo and Richardson 2018. A folder holds

    tokenizer.json           the whole tokenizer
    spiece.model             SentencePiece's own model, if the tokenizer was read from one or trained; XLM-R's is
                             sentencepiece.bpe.model
    tokenizer_config.json    tokenizer_class, do_lower_case and keep_accents (ALBERT), extra_ids (T5), special tokens
    special_tokens_map.json  the special tokens by role

The pieces, their scores and the character table come from the model; the `tokenizers` library applies them, as in the
reference implementation, which gives other ids than the `sentencepiece` library in a few cases: a space before a
special token, and a digit before a comma for ALBERT.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from ..corpus.corpus import Document
from ..errors import DataError
from ..progress import ProgressCallback, Reporter
from .template import Template, bert_template, token_ids
from .tokenizer import LONGEST, Tokenizer, cut_at_spaces, read_paragraphs

SPACE = "▁"
MODEL_FILES = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
ALBERT_TOKENS = {
    "bos": "[CLS]",
    "eos": "[SEP]",
    "unk": "<unk>",
    "sep": "[SEP]",
    "pad": "<pad>",
    "cls": "[CLS]",
    "mask": "[MASK]",
}
T5_TOKENS = {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
EXTRA_IDS = 100
_CONTROL, _USER_DEFINED = 3, 4  # types of pieces
_UNIGRAM, _BPE = 1, 2  # types of models

Pieces = list[tuple[str, float]]


class SentencePieceModel(NamedTuple):
    """The contents of a SentencePiece model file."""

    pieces: Pieces
    """each piece and its score, by id"""
    unk_id: int
    characters: bytes
    """compiled table for normalising characters; empty for none"""
    added: list[AddedToken]
    """pieces that are matched literally in texts"""
    unigram: bool
    """unigram; otherwise BPE"""
    byte_fallback: bool
    """whether characters without a piece are split into bytes"""
    state: bytes
    """the file"""


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece's pieces, with the special tokens and the normalisation of a family.

    Args:
        model: the SentencePiece model, to save again; None if there is none.
        model_file: name of the model's file.
        others: arguments of `Tokenizer`.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        template: Template,
        special_tokens: Mapping[str, str],
        *,
        settings: Mapping[str, Any],
        model: bytes | None = None,
        model_file: str = MODEL_FILES[0],
        where: str = "the tokenizer",
    ):
        super().__init__(backend, template, special_tokens, settings=settings, where=where)
        self._model, self._model_file = model, model_file
        self.kind = "unigram" if isinstance(backend.model, models.Unigram) else "bpe"

    def _continues(self, piece: str) -> bool:
        return not piece.startswith(SPACE)

    def _save_vocabulary(self, folder: Path) -> None:
        if self._model is not None:
            (folder / self._model_file).write_bytes(self._model)


def parse_model(state: bytes, where: str) -> SentencePieceModel:
    """Parse a SentencePiece model file.

    Raises:
        DataError: it is not a SentencePiece model, or one of words or characters.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        proto.ParseFromString(state)
    except DecodeError as error:
        raise DataError(f"{where}: not a SentencePiece model ({error}).") from None
    trained = proto.trainer_spec
    if not proto.pieces or trained.model_type not in (_UNIGRAM, _BPE):
        raise DataError(f"{where}: not a SentencePiece model of unigram or BPE pieces.")
    return SentencePieceModel(
        [(piece.piece, piece.score) for piece in proto.pieces],
        trained.unk_id,
        proto.normalizer_spec.precompiled_charsmap,
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
            for piece in proto.pieces
            if piece.type in (_CONTROL, _USER_DEFINED)
        ],
        trained.model_type == _UNIGRAM,
        trained.byte_fallback,
        state,
    )


def albert_backend(
    pieces: Pieces, characters: bytes, *, lowercase: bool = True, keep_accents: bool = False, spaced: bool = True
) -> tokenizers.Tokenizer:
    """Build ALBERT's tokenizer from unigram pieces.

    Args:
        pieces: each piece and its score, by id; the unknown one is 1.
        characters: compiled table for normalising characters; empty for none.
        lowercase: lower-case the text.
        keep_accents: keep accents.
        spaced: begin a text like a word after a space.
    """
    steps: list[Any] = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    if not keep_accents:
        steps += [normalizers.NFKD(), normalizers.StripAccents()]
    if lowercase:
        steps.append(normalizers.Lowercase())
    if characters:
        steps.append(normalizers.Precompiled(characters))
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=1, byte_fallback=False))
    backend.normalizer = normalizers.Sequence(steps)
    return _split_at_spaces(backend, "always" if spaced else "never")


def t5_backend(pieces: Pieces, characters: bytes) -> tokenizers.Tokenizer:
    """Build T5's tokenizer from unigram pieces.

    Args:
        pieces: each piece and its score, by id, including <extra_id_0> and so on; the unknown one is 2.
        characters: compiled table for normalising characters; empty for none.
    """
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    if characters:
        backend.normalizer = normalizers.Precompiled(characters)
    return _split_at_spaces(backend, "always")


def t5_template(backend: tokenizers.Tokenizer, where: str, eos: str = T5_TOKENS["eos"]) -> Template:
    """Return the template `A </s> B </s>`, which `backend` is given too; `eos` is the token.

    Raises:
        DataError: the vocabulary lacks the token.
    """
    (number,) = token_ids(backend, (eos,), where)
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", eos], pair=["$A", eos, "$B:0", eos], special_tokens=[(eos, number)]
    )
    return Template((), (number,), (number,))


def xlm_roberta_backend(pieces: Pieces, characters: bytes, *, spaced: bool = True) -> tokenizers.Tokenizer:
    """Build XLM-R's tokenizer from unigram pieces.

    Args:
        pieces: each piece and its score, by id, as in fairseq: <s>, <pad>, </s>, <unk>, the pieces, <mask>.
        characters: compiled table for normalising characters; empty for none.
        spaced: begin a text like a word after a space.
    """
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=False))
    if characters:
        backend.normalizer = normalizers.Precompiled(characters)
    return _split_at_spaces(backend, "always" if spaced else "never")


def fairseq_pieces(pieces: Pieces, special_tokens: Mapping[str, str]) -> Pieces:
    """Return a SentencePiece model's pieces with fairseq's ids: its first three, <unk>, <s> and </s>, are replaced."""
    first = [(special_tokens[role], 0.0) for role in ("bos", "pad", "eos", "unk")]
    return [*first, *pieces[3:], (special_tokens["mask"], 0.0)]


def xlm_roberta_template(backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str], where: str) -> Template:
    """Return the template `<s> A </s></s> B </s>`, all with token type 0, which `backend` is given too.

    Raises:
        DataError: the vocabulary lacks these tokens.
    """
    bos, eos = special_tokens["bos"], special_tokens["eos"]
    before, after = token_ids(backend, (bos, eos), where)
    backend.post_processor = processors.TemplateProcessing(
        single=[bos, "$A", eos], pair=[bos, "$A", eos, eos, "$B:0", eos], special_tokens=[(bos, before), (eos, after)]
    )
    return Template((before,), (after, after), (after,))


def extra_ids(count: int) -> Pieces:
    """Return T5's sentinels, which come after all other pieces, the first one last."""
    return [(f"<extra_id_{number}>", 0.0) for number in reversed(range(count))]


def _split_at_spaces(backend: tokenizers.Tokenizer, prepend: Literal["always", "never"]) -> tokenizers.Tokenizer:
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=prepend)]
    )
    backend.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme=prepend)
    return backend


# Training


def train_unigram(
    documents: Iterable[Document],
    *,
    vocab_size: int = 30_000,
    family: Literal["albert", "t5"] = "albert",
    lowercase: bool = True,
    progress: ProgressCallback | None = None,
) -> SentencePieceTokenizer:
    """Learn unigram pieces from documents (Kudo 2018), deterministically.

    Args:
        documents: documents, read once.
        vocab_size: maximum vocabulary size, including special tokens but not T5's 100 sentinels, which are added; a
            small corpus may give fewer.
        family: albert, with [CLS], [SEP] and [MASK] for encoders, or t5, with </s> and the sentinels.
        lowercase: lower-case the text and strip accents, as ALBERT's uncased models do; ALBERT only.

    Raises:
        DataError: the corpus has too few pieces, or more characters than the vocabulary size.
    """
    import sentencepiece

    albert = family == "albert"
    special: dict[str, Any]
    if albert:
        special = dict(pad_id=0, unk_id=1, bos_id=-1, eos_id=-1, control_symbols="[CLS],[SEP],[MASK]")
    else:
        special = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    # Training uses the same normalisation as tokenisation: the family's own steps.
    empty = [("<pad>", 0.0), ("<unk>", 0.0)]
    normalizer = albert_backend(empty, b"", lowercase=lowercase, keep_accents=not lowercase).normalizer
    report = Reporter("reading for the vocabulary", "MB", progress)

    def texts() -> Iterator[str]:
        for paragraphs in read_paragraphs(documents, report):
            for text in map(normalizer.normalize_str, paragraphs) if albert else paragraphs:
                yield from cut_at_spaces(text)

    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts(),
            model_writer=written,
            vocab_size=vocab_size,
            model_type="unigram",
            character_coverage=0.9995,
            hard_vocab_limit=False,
            num_threads=16,  # fixed, since sums depend on the number of threads
            max_sentence_length=LONGEST,
            minloglevel=2,
            **special,
        )
    except RuntimeError as error:
        raise DataError(f"SentencePiece cannot learn {vocab_size} pieces from this text: {error}") from None
    model = parse_model(written.getvalue(), "the trained model")
    if albert:
        backend = albert_backend(model.pieces, model.characters, lowercase=lowercase, keep_accents=not lowercase)
        tokens, template = ALBERT_TOKENS, bert_template(backend, ALBERT_TOKENS, "the trained model")
        settings = {
            "tokenizer_class": "AlbertTokenizer",
            "do_lower_case": lowercase,
            "keep_accents": not lowercase,
            "add_prefix_space": True,
        }
    else:
        backend = t5_backend([*model.pieces, *extra_ids(EXTRA_IDS)], model.characters)
        tokens, template = T5_TOKENS, t5_template(backend, "the trained model")
        settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": EXTRA_IDS}
        backend.add_special_tokens([piece for piece, _ in extra_ids(EXTRA_IDS)])
    backend.add_special_tokens(list(dict.fromkeys(tokens.values())))
    return SentencePieceTokenizer(backend, template, tokens, settings=settings, model=model.state)


def unigram_pieces(whole: Mapping[str, Any], where: str) -> tuple[Pieces, bytes]:
    """Return (pieces and scores, the compiled character table) of a tokenizer.json.

    Raises:
        DataError: it has no unigram model.
    """
    try:
        pieces = [(str(piece), float(score)) for piece, score in whole["model"]["vocab"]]
        normalizer = whole.get("normalizer") or {}
        steps = normalizer.get("normalizers", [normalizer])
        compiled = next((step["precompiled_charsmap"] for step in steps if step.get("type") == "Precompiled"), "")
        return pieces, base64.b64decode(compiled or "")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: not a unigram tokenizer ({type(error).__name__}: {error}).") from None
