"""Byte-level BPE (GPT-2, RoBERTa, BART): bytes as characters, merged within words; Ġ is the space before a word.

Radford et al. 2019, 2.2. A folder holds

    tokenizer.json           the whole tokenizer
    vocab.json, merges.txt   the ids of the pieces, and the merges in their order
    tokenizer_config.json    tokenizer_class, add_prefix_space, the special tokens
    special_tokens_map.json  the special tokens by role
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from ..errors import DataError
from .tokenizer import Template, Tokenizer

ROBERTA_TOKENS = {
    "bos": "<s>",
    "eos": "</s>",
    "unk": "<unk>",
    "sep": "</s>",
    "pad": "<pad>",
    "cls": "<s>",
    "mask": "<mask>",
}
GPT2_TOKENS = dict.fromkeys(("bos", "eos", "unk"), "<|endoftext|>")
_SPACES = ("Ġ", "Ċ", "ĉ", "č")  # space, line feed, tab and carriage return, as bytes are written


class ByteBpeTokenizer(Tokenizer):
    """GPT-2's bytes and merges, in its words.

    A word after a space is another piece than one at the start of a text, unless `add_prefix_space` puts a space there;
    the words of texts that are split already (`encode_words`) always get one.
    """

    def _continues(self, piece: str) -> bool:
        return not piece.startswith(_SPACES)

    @cached_property
    def _spaced(self) -> tokenizers.Tokenizer:
        state = json.loads(self.backend.to_str())
        for step in _steps(state["pre_tokenizer"]):
            if step["type"] == "ByteLevel":
                step["add_prefix_space"] = True
        return tokenizers.Tokenizer.from_str(json.dumps(state))

    def _save_vocabulary(self, folder: Path) -> None:
        model = self._state["model"]
        vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
        (folder / "vocab.json").write_text(vocabulary + "\n", encoding="utf-8")
        merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
        lines = "".join(f"{line}\n" for line in ("#version: 0.2", *merges))
        (folder / "merges.txt").write_text(lines, encoding="utf-8")


def byte_bpe_backend(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], *, add_prefix_space: bool = False
) -> tokenizers.Tokenizer:
    """GPT-2's tokenizer around a vocabulary and its merges.

    Args:
        vocabulary: ids of the pieces, bytes written as printable characters.
        merges: in the order of their learning.
        add_prefix_space: put a space before a text that begins with none.

    Raises:
        DataError: a merge whose parts or outcome the vocabulary lacks.
    """
    try:
        model = models.BPE(
            dict(vocabulary), list(merges), continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False
        )
    except Exception as error:  # the library raises the bare class
        raise DataError(f"The merges do not fit the vocabulary ({error}).") from None
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend


def roberta_template(
    backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str], *, add_prefix_space: bool, where: str
) -> Template:
    """`<s> A </s></s> B </s>`, all of token type 0; `backend` is given the same.

    Raises:
        DataError: the vocabulary has no such tokens.
    """
    tokens = [special_tokens[role] for role in ("cls", "sep")]
    cls, sep = (backend.token_to_id(token) for token in tokens)
    if cls is None or sep is None:
        missing = ", ".join(token for token in tokens if backend.token_to_id(token) is None)
        raise DataError(f"{where}: the vocabulary has no {missing}, which RoBERTa puts around every text.")
    backend.post_processor = processors.RobertaProcessing(
        (tokens[1], sep), (tokens[0], cls), trim_offsets=True, add_prefix_space=add_prefix_space
    )
    return Template((cls,), (sep, sep), (sep,))


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [] if step is None else step.get("pretokenizers", [step])
