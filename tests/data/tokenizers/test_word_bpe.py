"""GPT's tokenizer: as the reference's, from either kind of files, and with the tokens around texts of fine-tuning."""

import json
from pathlib import Path

import numpy as np
import pytest

from bestiary.data import DataError, load_tokenizer
from bestiary.data.tokenizers.word_bpe import WordBpeTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz.,!'é"
PIECES = [
    "<unk>",
    *LETTERS,
    *(f"{letter}</w>" for letter in LETTERS),
    "th",
    "the</w>",
    "se",
    "sea</w>",
    "wa",
    "was</w>",
]
MERGES = ["t h", "th e</w>", "s e", "se a</w>", "w a", "wa s</w>"]
TEXT = "The SEA was, the café's sea!"
# `OpenAIGPTTokenizer.from_pretrained` of transformers 5.23.0 on these files: it strips accents and splits punctuation.
EXPECTED = [
    "the</w>",
    "sea</w>",
    "was</w>",
    ",</w>",
    "the</w>",
    "c",
    "a",
    "f",
    "e</w>",
    "'</w>",
    "s</w>",
    "sea</w>",
    "!</w>",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(PIECES)}))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    (tmp_path / "config.json").write_text('{"model_type": "openai-gpt"}')
    return tmp_path


def test_ids_are_the_reference_ones(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, WordBpeTokenizer)
    (ids,) = tokenizer.encode_batch([TEXT])
    assert [tokenizer.tokens[i] for i in ids] == EXPECTED
    assert tokenizer.decode(ids) == "the sea was , the cafe ' s sea !"
    assert tokenizer.encode_batch(["ж"])[0] == [0]
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.encode_batch([TEXT])[0] == ids
    assert (
        json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["tokenizer_class"]
        == "OpenAIGPTTokenizer"
    )
    (folder / "config.json").unlink()
    assert isinstance(load_tokenizer(folder), WordBpeTokenizer)  # by its pieces


def test_texts_between_new_tokens(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder).delimited("_start_", "_delimiter_", "_classify_")
    size = len(PIECES)
    assert tokenizer.vocab_size == size + 3
    batch = tokenizer(["The sea"], ["was"])
    the, sea, was = (PIECES.index(piece) for piece in ("the</w>", "sea</w>", "was</w>"))
    np.testing.assert_array_equal(batch["input_ids"], [[size, the, sea, size + 1, was, size + 2]])
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    np.testing.assert_array_equal(again(["The sea"], ["was"])["input_ids"], batch["input_ids"])
    assert again.template == tokenizer.template
    assert again.delimited("_start_", "_delimiter_", "_classify_").vocab_size == size + 3


def test_damaged_files_are_refused(folder: Path) -> None:
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({"<pad>" if k == "<unk>" else k: v for k, v in vocabulary.items()}))
    with pytest.raises(DataError, match="has no <unk>"):
        load_tokenizer(folder)
    (folder / "merges.txt").unlink()
    with pytest.raises(DataError, match="needs its merges"):
        load_tokenizer(folder)
