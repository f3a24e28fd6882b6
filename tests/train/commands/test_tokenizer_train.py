"""`bestiary tokenizer train` writes a folder of each kind, which is loaded as it was trained."""

import json
from pathlib import Path

import pytest

from bestiary.data import load_tokenizer
from bestiary.train.cli import main

TEXT = "The lobster sees the lobsters, and the lobsters see the sea.\n\nIt's a lobster's life under the sea!\n" * 30
KINDS = {
    "wordpiece": ("BertTokenizer", "[CLS]", ["vocab.txt"]),
    "byte-bpe": ("RobertaTokenizer", "<s>", ["vocab.json", "merges.txt"]),
    "unigram": ("AlbertTokenizer", "[CLS]", ["spiece.model"]),
    "words": ("PreTrainedTokenizerFast", "the", ["vocab.json"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a.txt").write_text(TEXT)
    size = {"wordpiece": "120", "byte-bpe": "300", "unigram": "60", "words": "60"}[kind]
    out = tmp_path / "tokenizer"
    command = ["tokenizer", "train", "--kind", kind, "--vocab-size", size, "--corpus", str(tmp_path / "a.txt")]
    assert main([*command, "--out", str(out)]) == 0
    assert "tokens from 1 document\n" in capsys.readouterr().err
    named, cls, files = KINDS[kind]
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == named
    assert all((out / file).is_file() for file in files)
    tokenizer = load_tokenizer(out)
    assert tokenizer.vocab_size <= int(size)
    (ids,) = tokenizer.encode_batch(["the lobster"], add_special_tokens=True)
    assert tokenizer.tokens[ids[0]] == cls
    assert len(ids) < 8
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the lobster"


def test_a_family_of_another_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a.txt").write_text(TEXT)
    command = ["tokenizer", "train", "--kind", "byte-bpe", "--family", "t5", "--corpus", str(tmp_path / "a.txt")]
    assert main([*command, "--out", str(tmp_path / "out")]) == 1
    assert "--family t5 does not have --kind byte-bpe; expected roberta or gpt2." in capsys.readouterr().err
