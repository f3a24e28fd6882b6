"""WordPiece gives the reference implementation's ids, trains to one outcome, and refuses what it cannot use."""

import json
from pathlib import Path

import numpy as np
import pytest

from bestiary.data import EMBEDDED, Corpus, DataError, Tokenizer, load_tokenizer, train_wordpiece
from bestiary.data.corpus.corpus import Document

FIXTURES = Path(__file__).parents[1] / "fixtures" / "wordpiece"
TEXTS = json.loads((FIXTURES / "texts.json").read_text())
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def document(*sentences: str) -> Document:
    return Document("\n".join(sentences), "lines", "test")


def check_parity(tokenizer: Tokenizer, expected: dict[str, list]) -> None:
    ids = tokenizer.encode_batch(TEXTS, add_special_tokens=True)
    assert ids == expected["ids"]
    assert tokenizer.encode_batch(TEXTS) == [row[1:-1] for row in expected["ids"]]
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in ids] == expected["decoded"]


@pytest.mark.parametrize("name", ["uncased", "cased"])
def test_ids_are_those_of_the_reference_implementation(name: str, tmp_path: Path):
    tokenizer = load_tokenizer(FIXTURES / name)
    assert tokenizer.lowercase == (name == "uncased")
    check_parity(tokenizer, EXPECTED[name])
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    check_parity(loaded, EXPECTED[name])
    assert loaded.fingerprint == tokenizer.fingerprint
    (tmp_path / "saved" / "tokenizer.json").unlink()
    check_parity(load_tokenizer(tmp_path / "saved"), EXPECTED[name])


@pytest.mark.parametrize("name", ["bert-base-uncased", "bert-base-cased"])
def test_released_vocabularies(name: str, shared: Path):
    tokenizer = load_tokenizer(shared / "data" / "tokenizers" / name / "vocab.txt")
    check_parity(tokenizer, EXPECTED[name])
    assert tokenizer.lowercase == name.endswith("uncased")
    sizes = {"bert-base-uncased": 30_522, "bert-base-cased": 28_996}
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.unk_id) == (sizes[name], 0, 100)
    assert (tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == (101, 102, 103)


def test_saved_folder_has_the_released_files(tmp_path: Path):
    load_tokenizer(FIXTURES / "cased").save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "tokenizer.json",
        "vocab.txt",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }
    assert (tmp_path / "vocab.txt").read_bytes() == (FIXTURES / "cased" / "vocab.txt").read_bytes()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["tokenizer_class"], config["do_lower_case"]) == ("BertTokenizer", False)


def test_settings_beside_a_vocabulary_are_kept(tmp_path: Path):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, "Käse", "käse", "kase"]))
    texts = ["Käse"]
    assert load_tokenizer(tmp_path).encode_batch(texts) == [[5]]  # an upper-case letter: a cased vocabulary
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"do_lower_case": true}')
    assert load_tokenizer(tmp_path).encode_batch(texts) == [[7]]
    config.write_text('{"do_lower_case": true, "strip_accents": false}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_batch(texts) == [[6]]
    tokenizer.save(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.json").unlink()
    assert load_tokenizer(tmp_path / "saved").encode_batch(texts) == [[6]]


def test_what_masking_needs_to_know():
    tokenizer = load_tokenizer(FIXTURES / "uncased")
    assert tokenizer.special.dtype == tokenizer.continuation.dtype == np.bool_
    assert tokenizer.special.shape == tokenizer.continuation.shape == (tokenizer.vocab_size,)
    assert [tokenizer.tokens[i] for i in np.flatnonzero(tokenizer.special)] == SPECIAL
    continuing = [piece for piece, yes in zip(tokenizer.tokens, tokenizer.continuation, strict=True) if yes]
    assert "##ing" in continuing
    assert all(piece.startswith("##") for piece in continuing)
    assert [tokenizer.tokens[i] for i in (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id)] == SPECIAL[:3]
    assert [tokenizer.tokens[i] for i in (tokenizer.sep_id, tokenizer.mask_id)] == SPECIAL[3:]


# --- training ---------------------------------------------------------------------------------------------------------


def test_training_has_one_outcome():
    documents = [*Corpus([EMBEDDED])][:60]
    first, second = (train_wordpiece(documents, vocab_size=1000) for _ in range(2))
    assert first.tokens == second.tokens
    assert first.fingerprint == second.fingerprint
    assert train_wordpiece(iter(documents), vocab_size=1000).tokens == first.tokens
    assert first.vocab_size == 1000
    assert first.tokens[:5] == SPECIAL
    paragraphs = [paragraph for document in documents for paragraph in document.paragraphs()]
    ids = first.encode_batch(paragraphs)
    assert not any(first.unk_id in row for row in ids)
    assert sum(map(len, ids)) < 0.5 * sum(map(len, paragraphs))


def test_frequent_words_become_pieces():
    documents = [document("the lobster sees the lobsters", "lobster ! Lobster"), document("Ünder the sea")]
    tokenizer = train_wordpiece(documents, vocab_size=200)
    assert {"lobster", "the"} <= set(tokenizer.tokens)
    assert "under" not in tokenizer.tokens  # once only
    assert tokenizer.decode(tokenizer.encode_batch(["Under lobsters!"])[0]) == "under lobsters!"
    assert "##!" not in tokenizer.tokens
    cased = train_wordpiece(documents, vocab_size=200, lowercase=False, min_frequency=1)
    assert {"Lobster", "Ünder"} <= set(cased.tokens)
    assert not cased.lowercase


def test_rare_characters_are_left_out():
    documents = [document("aaaa bbbb cc x", "ab ba ca")]
    tokenizer = train_wordpiece(documents, vocab_size=50, alphabet_limit=3)
    assert tokenizer.encode_batch(["ab x"])[0][-1] == tokenizer.unk_id
    assert "x" not in tokenizer.tokens


def test_a_vocabulary_smaller_than_its_alphabet_is_refused():
    with pytest.raises(DataError, match=r"A vocabulary of 12 pieces: too small.* 4 characters alone take 13"):
        train_wordpiece([document("abcd")], vocab_size=12)


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as raised:
        load_tokenizer(path)
    return str(raised.value)


def test_a_vocabulary_without_special_tokens_is_refused(tmp_path: Path):
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\nword\n")
    assert refusal(path) == (
        f"{path}: the vocabulary has no [SEP], [MASK]. Pretraining needs [PAD], [UNK], [CLS], [SEP], [MASK]; take a "
        "BERT vocabulary, or train one: bestiary tokenizer train."
    )


def test_other_refusals(tmp_path: Path):
    assert refusal(tmp_path / "no") == (
        f"{tmp_path}/no: there is no such file or folder. Expected a tokenizer's folder or its vocab.txt."
    )
    assert refusal(tmp_path) == (
        f"{tmp_path}: no tokenizer in this folder. Expected tokenizer.json, vocab.txt, vocab.json and merges.txt, or "
        "spiece.model."
    )
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*SPECIAL, "word", "other", "word"]))
    assert refusal(path) == f"{path}, line 8: the piece 'word' is also on line 6."
    path.write_bytes(b"[PAD]\n\xff\n")
    assert refusal(path).startswith(f"{path}: not a vocabulary: not UTF-8 at byte 6.")
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{}")
    assert refusal(broken).startswith(f"{broken}: not a tokenizer.json that `tokenizers`")


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path):
    import tokenizers

    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(path))
    expected = "WordPiece, byte-level BPE, SentencePiece's pieces, words or characters"
    assert refusal(path) == f"{path}: a BPE tokenizer; expected {expected}."


def test_gaps_between_ids_are_refused(tmp_path: Path):
    import tokenizers

    path = tmp_path / "tokenizer.json"
    vocabulary = {token: number for number, token in enumerate(SPECIAL)} | {"word": 9}
    tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]")).save(str(path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    assert refusal(path) == f"{path}: 6 tokens, but the highest id is 9. Ids must be consecutive from 0."
