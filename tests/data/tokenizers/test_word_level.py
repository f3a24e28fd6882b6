"""Whole words and characters as tokens: vocabularies by frequency, ends of lines, WikiText's own counts."""

from pathlib import Path

import pytest

from bestiary.data import Corpus, load_tokenizer, train_tokenizer
from bestiary.data.errors import DataError
from bestiary.data.tokenizers.text_stream import TextStream

TEXT = " \n = Tides = \n \n the sea , the ship and the <unk> \n a ship @-@ wreck \n"


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    (tmp_path / "a.txt").write_text(TEXT)
    return Corpus([tmp_path / "a.txt"], verbatim=True)


def test_words_are_numbered_by_frequency_and_lines_end(corpus: Corpus, tmp_path: Path) -> None:
    trained = train_tokenizer("words", corpus, vocab_size=10)
    assert trained.tokens == ["<eos>", "<unk>", "the", "=", "ship", ",", "@-@", "Tides", "a", "and"]
    trained.save(tmp_path / "saved")
    tokenizer = load_tokenizer(tmp_path / "saved")
    assert (tokenizer.kind, tokenizer.eos_id, tokenizer.unk_id) == ("words", 0, 1)
    assert tokenizer.fingerprint == trained.fingerprint
    ids, _ = tokenizer.encode_literally(["the sea\n\nthe <unk>  ship\n"])
    assert ids.tolist() == [2, 1, 0, 0, 2, 1, 4, 0]
    assert tokenizer.encode_batch(["the sea\n\nthe <unk>  ship\n"]) == [ids.tolist()]
    assert tokenizer.decode(ids) == "the <unk>\n\nthe <unk> ship\n"
    stream = TextStream(tokenizer, [2], ())
    assert [stream.push([token]) for token in (4, 9, 0, 2)] == [" ship", " and", "\n", "the"]


def test_characters_are_code_points(corpus: Corpus, tmp_path: Path) -> None:
    train_tokenizer("characters", corpus, vocab_size=99).save(tmp_path / "saved")
    tokenizer = load_tokenizer(tmp_path / "saved")
    assert tokenizer.kind == "characters"
    assert tokenizer.tokens[:4] == ["<eos>", "<unk>", " ", "e"]
    ids, _ = tokenizer.encode_literally(["the <eos>\n"])
    assert [tokenizer.tokens[i] for i in ids] == [*"the <", "e", "<unk>", "s", ">", "\n"]
    assert tokenizer.decode(ids) == "the <e<unk>s>\n"
    assert tokenizer.encode_batch(["a<eos>é"]) == [[tokenizer.tokens.index("a"), 0, 1]]


def test_a_vocabulary_without_room_is_refused(corpus: Corpus) -> None:
    with pytest.raises(DataError, match="A vocabulary of 2 words: too small; 2 are special tokens"):
        train_tokenizer("words", corpus, vocab_size=2)


def test_the_words_of_wikitext(shared: Path) -> None:
    """33,278 words, and 217,646 tokens of the validation text, as its distributors count them."""
    folder = shared / "data" / "wikitext2"
    tokenizer = train_tokenizer("words", Corpus([folder / "wiki.train.tokens"], verbatim=True), vocab_size=40_000)
    assert tokenizer.vocab_size == 33_278
    assert tokenizer.tokens[:5] == ["<eos>", "<unk>", "the", ",", "."]
    ids, _ = tokenizer.encode_literally([(folder / "wiki.valid.tokens").read_text()])
    assert len(ids) == 217_646
