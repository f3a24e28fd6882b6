"""Byte-level BPE (GPT-2, RoBERTa, BART): bytes as characters, merged within words; Ġ is the space before a word.

Radford et al. 2019, 2.2. A folder holds

    tokenizer.json           the whole tokenizer
    vocab.json, merges.txt   the ids of the pieces, and the merges in their order
    tokenizer_config.json    tokenizer_class, add_prefix_space, the special tokens
    special_tokens_map.json  the special tokens by role
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from ..corpus.corpus import Document
from ..errors import DataError
from ..progress import ProgressCallback, Reporter
from .template import Template, roberta_template
from .tokenizer import Tokenizer, read_paragraphs

ROBERTA_TOKENS = {
    "bos": "<s>",
    "eos": "</s>",
    "unk": "<unk>",
    "sep": "</s>",
    "pad": "<pad>",
    "cls": "<s>",
    "mask": "<mask>",
}
GPT2_TOKENS = {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"}
_SPACES = ("Ġ", "Ċ", "ĉ", "č")  # space, line feed, tab and carriage return, as bytes are written


class ByteBpeTokenizer(Tokenizer):
    """GPT-2's bytes and merges, within its words.

    A word after a space has other tokens than one at the start of a text, unless `add_prefix_space` puts a space there;
    words of texts that are already split (`encode_words`) always get one.
    """

    kind = "byte-bpe"

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
        save_bpe(self._state["model"], folder)


def save_bpe(model: Mapping[str, Any], folder: Path) -> None:
    """Write vocab.json and merges.txt of the BPE model in a tokenizer.json."""
    vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary + "\n", encoding="utf-8")
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    lines = "".join(f"{line}\n" for line in ("#version: 0.2", *merges))
    (folder / "merges.txt").write_text(lines, encoding="utf-8")


def byte_bpe_backend(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], *, add_prefix_space: bool = False
) -> tokenizers.Tokenizer:
    """Build GPT-2's tokenizer from a vocabulary and its merges.

    Args:
        vocabulary: ids of the tokens, with bytes as printable characters.
        merges: merges, in the order in which they were learnt.
        add_prefix_space: put a space before a text that does not begin with one.

    Raises:
        DataError: the vocabulary lacks the parts or the result of a merge.
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


def train_byte_bpe(
    documents: Iterable[Document],
    *,
    vocab_size: int = 50_265,
    family: Literal["roberta", "gpt2"] = "roberta",
    min_frequency: int = 2,
    progress: ProgressCallback | None = None,
) -> ByteBpeTokenizer:
    """Learn byte merges from documents, deterministically.

    The special tokens come first, then the 256 bytes, then the results of the merges in the order of learning.

    Args:
        documents: documents, read once.
        vocab_size: maximum vocabulary size, including special tokens; a small corpus may give fewer.
        family: roberta, with <s>, <pad>, </s>, <unk> and <mask>, or gpt2, with <|endoftext|>.
        min_frequency: minimum frequency of a pair to be merged.

    Raises:
        DataError: the vocabulary size is too small for the special tokens and the bytes.
    """
    roberta = family == "roberta"
    tokens = ROBERTA_TOKENS if roberta else GPT2_TOKENS
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if roberta else ["<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(special) + len(alphabet):
        raise DataError(
            f"A vocabulary of {vocab_size} pieces: too small. The special tokens and the {len(alphabet)} bytes alone "
            f"take {len(special) + len(alphabet)}."
        )
    backend = byte_bpe_backend({}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        initial_alphabet=sorted(alphabet),
        special_tokens=special,
        show_progress=False,
    )
    report = Reporter("reading for the vocabulary", "MB", progress)
    backend.train_from_iterator(read_paragraphs(documents, report), trainer)
    model = json.loads(backend.to_str())["model"]
    backend = byte_bpe_backend(model["vocab"], [(left, right) for left, right in model["merges"]])
    settings = {"tokenizer_class": "RobertaTokenizer" if roberta else "GPT2Tokenizer", "add_prefix_space": False}
    if not roberta:
        backend.add_special_tokens(special)
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
        return ByteBpeTokenizer(backend, Template(), tokens, settings=settings)
    # As in the released folder, the mask takes the space before it.
    backend.add_special_tokens([*special[:-1], AddedToken("<mask>", lstrip=True, special=True)])
    template = roberta_template(backend, tokens, "the trained tokenizer", add_prefix_space=False)
    return ByteBpeTokenizer(backend, template, tokens, settings=settings)


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [] if step is None else step.get("pretokenizers", [step])
