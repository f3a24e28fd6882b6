"""BPE within words (GPT): lower-cased words, split at spaces and punctuation; `</w>` ends a word's last piece.

Radford et al. 2018, 4.1, after Sennrich et al. 2016. A folder holds

    tokenizer.json           the whole tokenizer
    vocab.json, merges.txt   the ids of the pieces, and the merges in their order
    tokenizer_config.json    tokenizer_class, the special tokens
    special_tokens_map.json  the special tokens by role

As in the reference implementation, words are split as for BERT; the authors' code used spaCy and ftfy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from ..errors import DataError
from .byte_bpe import save_bpe
from .tokenizer import Tokenizer

GPT_TOKENS = {"unk": "<unk>"}
END = "</w>"


class WordBpeTokenizer(Tokenizer):
    """GPT's tokenizer. Its texts have no special tokens around them, and upper case and spaces are lost."""

    kind = "word-bpe"

    def _continues(self, piece: str) -> bool:
        return False  # only the piece before would tell

    def _save_vocabulary(self, folder: Path) -> None:
        save_bpe(self._state["model"], folder)


def word_bpe_backend(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], unk: str
) -> tokenizers.Tokenizer:
    """Build GPT's tokenizer from a vocabulary and its merges.

    Args:
        vocabulary: ids of the pieces.
        merges: merges, in the order in which they were learnt.
        unk: token of the vocabulary for characters that are not in it.

    Raises:
        DataError: the vocabulary lacks this token, or the parts or the result of a merge.
    """
    if unk not in vocabulary:
        raise DataError(f"The vocabulary has no {unk}, its unk_token.")
    try:
        model = models.BPE(
            dict(vocabulary), list(merges), continuing_subword_prefix="", end_of_word_suffix=END, unk_token=unk
        )
    except Exception as error:  # the library raises the bare class
        raise DataError(f"The merges do not fit the vocabulary ({error}).") from None
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder(suffix=END)
    return backend
