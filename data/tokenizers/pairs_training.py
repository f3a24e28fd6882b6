"""Train the subword tokenizers of translation: SentencePiece's unigram and BPE pieces, and BPE within words."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from ..errors import DataError
from .kinds import PairKind
from .pairs import BOS, EOS, PAD, UNK, WORD_END, PairTokenizer, SentencePieceSide, Side, TextForm, WordBpeSide
from .tokenizer import LONGEST, cut_at_spaces


def train_subwords(
    kind: PairKind,
    source: Callable[[], Iterable[str]],
    target: Callable[[], Iterable[str]],
    *,
    vocab_size: int,
    joint: bool,
    form: TextForm,
    split_digits: bool = False,
) -> PairTokenizer:
    """Train subwords, deterministically.

    Args:
        kind: `unigram` or `bpe` (SentencePiece), or `word-bpe`, BPE within words (`tokenizers`).
        source: returns the prepared source texts; called more than once.
        target: returns the prepared target texts; called more than once.
        vocab_size: vocabulary size, the four special tokens included; per side if they are separate. A small text may
            give fewer subwords.
        joint: whether both sides share one vocabulary.
        form: the preparation of the texts.
        split_digits: split numbers into single digits; SentencePiece only.

    Raises:
        DataError: the vocabulary is too small for the text's characters.
    """
    if kind == "word-bpe" and split_digits:
        raise DataError("BPE within words cannot split digits; use SentencePiece for that.")
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
            sentence_iterator=(part for text in texts() for part in cut_at_spaces(text)),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=kind,
            max_sentence_length=LONGEST,
            character_coverage=1.0,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            hard_vocab_limit=False,
            split_digits=split_digits,
            num_threads=16,  # fixed, since sums depend on the number of threads
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
    # Declared as special tokens, the characters get their ids before the trainer starts, whose own numbering follows a
    # hash table that differs from process to process.
    given = [PAD, BOS, EOS, UNK, *sorted(characters), *sorted(last)]
    if vocab_size <= len(given):
        raise DataError(
            f"A vocabulary of {vocab_size} is too small: the four special tokens and the text's characters, within "
            f"words and at their ends, need {len(given)}."
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
    # Build it again from its vocabulary alone, in which the characters are ordinary subwords.
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
