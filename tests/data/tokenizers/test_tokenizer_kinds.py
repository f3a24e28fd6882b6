"""Every kind of tokenizer gives the reference implementation's ids, offsets, pairs and words, on odd texts too."""

import json
import pickle
import random
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from bestiary.data import EMBEDDED, Corpus, DataError, load_tokenizer, train_byte_bpe, train_tokenizer, train_unigram
from bestiary.data.tokenizers.tokenizer import LONGEST, check_vocabulary, cut_at_spaces

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tokenizers"
TEXTS = json.loads((FIXTURES / "texts.json").read_text())
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
OWN = ["byte_bpe", "albert", "t5", "xlm_roberta"]
RELEASED = ["bert-base-uncased", "bert-base-cased", "gpt2", "roberta-base", "t5-base", "albert-base-v2"]


@pytest.fixture(params=[*OWN, *RELEASED])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(name: str, request: pytest.FixtureRequest) -> Path:
    return FIXTURES / name if name in OWN else request.getfixturevalue("shared") / "data" / "tokenizers" / name


def test_ids_are_those_of_the_reference_implementation(name: str, folder: Path, tmp_path: Path):
    loaded = load_tokenizer(folder)
    loaded.save(tmp_path)
    for tokenizer in (loaded, load_tokenizer(tmp_path), pickle.loads(pickle.dumps(loaded))):
        expected = EXPECTED[name]
        assert tokenizer.encode_batch(TEXTS, add_special_tokens=True) == expected["ids"]
        pairs = tokenizer.encode(TEXTS, [*TEXTS[1:], TEXTS[0]])
        assert pairs.ids == expected["pairs"]
        if name != "gpt2":  # which has no token types; the reference numbers the texts
            assert pairs.types == expected["types"]
        words = [text.split() for text in TEXTS]
        encoded = iter(tokenizer.encode_words([*chain(*words)]))
        assert [[i for _ in some for i in next(encoded)] for some in words] == expected["words"]
        assert tokenizer.fingerprint == loaded.fingerprint


def test_spans_are_those_of_the_reference_implementation(name: str, folder: Path):
    tokenizer = load_tokenizer(folder)
    for text, (ids, spans), expected in zip(
        TEXTS, tokenizer.encode_with_spans(TEXTS), EXPECTED[name]["offsets"], strict=True
    ):
        assert ids.tolist() == tokenizer.encode_batch([text])[0]
        for span, (start, stop) in zip(spans.tolist(), expected, strict=True):
            if name == "gpt2":  # the reference keeps the space before a word in its span
                assert text[slice(*span)].strip() == text[start:stop].strip()
            else:
                assert span == [start, stop], text


def test_a_template_is_the_familys(shared: Path):
    folder = shared / "data" / "tokenizers"
    roberta, bert, gpt2 = (load_tokenizer(folder / name) for name in ("roberta-base", "bert-base-cased", "gpt2"))
    assert roberta.join([9, 8], [7]) == ([0, 9, 8, 2, 2, 7, 2], [0] * 7)
    assert bert.join([9, 8], [7]) == ([101, 9, 8, 102, 7, 102], [0, 0, 0, 0, 1, 1])
    assert gpt2.join([9, 8]) == ([9, 8], [0, 0])
    assert [tokenizer.template.cost(pair) for tokenizer in (roberta, bert, gpt2) for pair in (False, True)] == [
        2, 4, 2, 3, 0, 0,
    ]  # fmt: skip
    encoded = roberta.encode(["one two three four"], ["five six"], max_length=8)
    assert len(encoded.ids[0]) == 8
    assert encoded.truncated == 2
    with pytest.raises(DataError, match="A length of 3 tokens is too short: special tokens alone take 4"):
        roberta.encode(["one"], ["two"], max_length=3)


def test_a_missing_special_token_is_named(shared: Path):
    tokenizer = load_tokenizer(shared / "data" / "tokenizers" / "gpt2")
    assert tokenizer.special_ids == {"bos": 50256, "eos": 50256, "unk": 50256}
    with pytest.raises(DataError, match=r"The tokenizer has no mask token, which replaces a masked token"):
        _ = tokenizer.mask_id


def test_words_begin_where_a_space_was(shared: Path):
    tokenizer = load_tokenizer(shared / "data" / "tokenizers" / "roberta-base")
    (ids,) = tokenizer.encode_batch([" unaffable, said\nshe"])
    assert [tokenizer.tokens[i] for i in ids] == ["Ġunaff", "able", ",", "Ġsaid", "Ċ", "she"]
    assert tokenizer.continuation[ids].tolist() == [False, True, True, False, False, True]
    assert not tokenizer.continuation[list(tokenizer.special_ids.values())].any()
    assert np.flatnonzero(tokenizer.special).tolist() == [0, 1, 2, 3, 50264]
    tokenizer = load_tokenizer(FIXTURES / "albert")
    ids = tokenizer.encode_batch(["unaffable the"], add_special_tokens=True)[0]
    starts = [not yes for yes in tokenizer.continuation[ids]]
    assert sum(starts) == 4  # two words and what stands around them
    assert tokenizer.tokens[ids[-2]] == "▁the"


def test_a_batch_for_a_model(shared: Path):
    tokenizer = load_tokenizer(shared / "data" / "tokenizers" / "roberta-base")
    batch = tokenizer(["Hello world", "Hello"])
    assert batch["input_ids"].tolist() == [[0, 31414, 232, 2], [0, 31414, 2, 1]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}
    assert not batch["token_type_ids"].any()


# --- folders that say more than a vocabulary --------------------------------------------------------------------------

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "he", "said", "it", "##s", "E", "##1", "[", "]", "He"]


def bert_folder(path: Path, **files: dict) -> Path:
    (path / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_added_tokens_count(tmp_path: Path):
    folder = bert_folder(tmp_path, added_tokens={"[E1]": 14}, tokenizer_config={"do_lower_case": True})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode_batch(["he said [E1]"]) == [[5, 6, 14]]
    assert tokenizer.vocab_size == 15
    described = {"14": {"content": "[E1]", "lstrip": False, "normalized": False, "special": True}}
    bert_folder(tmp_path, tokenizer_config={"do_lower_case": True, "added_tokens_decoder": described})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode_batch(["he said [E1]"]) == [[5, 6, 14]]
    assert tokenizer.special[14]
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode_batch(["he said [E1]"]) == [[5, 6, 14]]
    (tmp_path / "saved" / "tokenizer.json").unlink()
    assert load_tokenizer(tmp_path / "saved").encode_batch(["he said [E1]"]) == [[5, 6, 14]]
    bert_folder(tmp_path, tokenizer_config={}, added_tokens={"[E1]": 20})
    with pytest.raises(DataError, match=r"the added token '\[E1\]' has the id 20, but the vocabulary would give it"):
        load_tokenizer(folder)


def test_settings_beside_a_whole_tokenizer_win(tmp_path: Path):
    load_tokenizer(bert_folder(tmp_path, tokenizer_config={"do_lower_case": False})).save(tmp_path / "saved")
    config = tmp_path / "saved" / "tokenizer_config.json"
    assert load_tokenizer(tmp_path / "saved").encode_batch(["He"]) == [[13]]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"do_lower_case": True}))
    assert load_tokenizer(tmp_path / "saved").encode_batch(["He"]) == [[5]]


@pytest.mark.parametrize(
    "stated",
    [
        None,
        {"type": "BertProcessing", "sep": ["[SEP]", 99], "cls": ["[CLS]", 2]},
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[NONE]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {},
        },
    ],
)
def test_a_template_is_not_left_to_a_broken_file(tmp_path: Path, stated: dict | None):
    load_tokenizer(bert_folder(tmp_path, tokenizer_config={"do_lower_case": True})).save(tmp_path / "saved")
    path = tmp_path / "saved" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": stated}))
    assert load_tokenizer(tmp_path / "saved").encode_batch(["he"], add_special_tokens=True) == [[2, 5, 3]]
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "saved" / name).unlink()  # now the file stands for itself
    with pytest.raises(DataError, match=r"tokenizer\.json: (no )?post_processor|not a tokenizer\.json"):
        load_tokenizer(tmp_path / "saved")


def sentence_piece_folder(path: Path, kind: str, settings: dict | None = None, roles: dict | None = None) -> Path:
    (path / "spiece.model").write_bytes((FIXTURES / kind / "spiece.model").read_bytes())
    (path / "tokenizer_config.json").write_text(json.dumps(settings or {}))
    (path / "special_tokens_map.json").write_text(json.dumps(roles or {}))
    return path


def test_special_tokens_of_a_sentence_piece_model_are_those_that_the_settings_name(tmp_path: Path):
    """The expected ids are the reference's."""

    def ids(kind: str, settings: dict | None = None, roles: dict | None = None) -> list[int]:
        folder = sentence_piece_folder(tmp_path, kind, settings, roles)
        return load_tokenizer(folder).encode_batch(["he said [E1] it"], add_special_tokens=True)[0]

    albert, t5 = ids("albert"), ids("t5")
    assert (albert[0], albert[-1], t5[-1]) == (2, 3, 1)
    assert ids("albert", {"sep_token": "[CLS]"}) == [*albert[:-1], 2]
    assert ids("t5", {"eos_token": "<e>"}) == [*t5[:-1], 700]
    # The map's older name counts beside a tokenizer.json alone.
    assert ids("albert", roles={"additional_special_tokens": ["[E1]"]}) == albert
    assert ids("albert", roles={"extra_special_tokens": ["[E1]"]}) == [*albert[:9], 600, *albert[-2:]]
    assert ids("albert", {"extra_special_tokens": [], "additional_special_tokens": ["[E1]"]})[9] == 600
    for name in ("add_bos_token", "add_eos_token"):
        with pytest.raises(DataError, match=f"{name} is not supported for ALBERT"):
            ids("albert", {name: False})
    with pytest.raises(DataError, match=r"the vocabulary has no \[NEW\]"):
        ids("albert", {"cls_token": "[NEW]"})


def test_a_list_of_special_tokens_takes_the_place_of_t5_s_sentinels(tmp_path: Path):
    (tmp_path / "saved").mkdir()
    text = "read <extra_id_0>"
    for settings in ({"additional_special_tokens": []}, {"extra_special_tokens": ["[E1]"]}):
        found = load_tokenizer(sentence_piece_folder(tmp_path, "t5", settings))
        assert found.encode_batch([text])[0][-2:] == [3, 699]  # a space, as before any piece
        found.save(tmp_path / "saved")
        assert load_tokenizer(tmp_path / "saved").encode_batch([text]) == found.encode_batch([text])
    found = load_tokenizer(sentence_piece_folder(tmp_path, "t5", {"extra_special_tokens": {"e_token": "[E1]"}}))
    assert found.encode_batch([text])[0][-2:] != [3, 699]


def test_what_would_make_ids_random_or_fail_later_is_refused(tmp_path: Path):
    load_tokenizer(FIXTURES / "byte_bpe").save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    path = tmp_path / "tokenizer.json"
    said = json.loads(path.read_text())
    for change, message in (
        ({"dropout": 0.5}, "ids would be random"),
        ({"unk_token": "[NONE]"}, r"no \[NONE\], its unk"),
    ):
        path.write_text(json.dumps(said | {"model": said["model"] | change}))
        with pytest.raises(DataError, match=message):
            load_tokenizer(tmp_path)


def test_a_type_of_model_whose_tokenizer_is_unknown_is_refused(tmp_path: Path):
    folder = bert_folder(tmp_path, tokenizer_config={}, config={"model_type": "mpnet"})
    with pytest.raises(DataError, match="the tokenizer of a 'mpnet' model is not implemented"):
        load_tokenizer(folder)
    bert_folder(tmp_path, tokenizer_config={"unk_token": "[NEW]"}, config={"model_type": "bert"})
    with pytest.raises(DataError, match=r"the vocabulary has no \[NEW\], its unk_token"):
        load_tokenizer(folder)
    bert_folder(tmp_path, tokenizer_config={"do_lower_case": None})
    with pytest.raises(DataError, match="do_lower_case is None"):
        load_tokenizer(folder)


def test_a_type_of_model_without_a_class_has_its_tokenizer_as_it_is(tmp_path: Path):
    """ModernBERT's files name no class of their own."""
    load_tokenizer(FIXTURES / "byte_bpe").save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "modernbert"}))
    ids = [load_tokenizer(folder).encode_batch(["as it is"]) for folder in (tmp_path, FIXTURES / "byte_bpe")]
    assert ids[0] == ids[1]


def test_a_mask_takes_the_space_before_it_where_the_file_says_so(tmp_path: Path):
    load_tokenizer(FIXTURES / "byte_bpe").save(tmp_path)
    path = tmp_path / "tokenizer.json"
    said = json.loads(path.read_text())
    next(token for token in said["added_tokens"] if token["content"] == "<mask>")["lstrip"] = True
    path.write_text(json.dumps(said))
    (ids,) = load_tokenizer(tmp_path).encode_batch(["the <mask>"])
    assert [load_tokenizer(tmp_path).tokens[i] for i in ids][-2:] == ["the", "<mask>"]


def test_a_tokenizer_with_more_pieces_than_the_model_has_rows_is_refused():
    tokenizer = load_tokenizer(FIXTURES / "byte_bpe")
    check_vocabulary(tokenizer, 704, "folder")
    with pytest.raises(
        DataError, match="folder: the tokenizer has 700 tokens, but the model's embedding table has 699 rows"
    ):
        check_vocabulary(tokenizer, 699, "folder")


def test_a_class_that_does_not_fit_its_files_is_refused(tmp_path: Path):
    (tmp_path / "spiece.model").write_bytes((FIXTURES / "t5" / "spiece.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(DataError, match=r"spiece\.model: not a file of its tokenizer class, bert"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "spiece.model").write_bytes(b"no model")
    with pytest.raises(DataError, match=r"spiece\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path)


# --- training ---------------------------------------------------------------------------------------------------------

TRAINERS = {
    "roberta": lambda documents: train_byte_bpe(documents, vocab_size=500),
    "gpt2": lambda documents: train_byte_bpe(documents, vocab_size=500, family="gpt2"),
    "albert": lambda documents: train_unigram(documents, vocab_size=400),
    "albert-cased": lambda documents: train_unigram(documents, vocab_size=400, lowercase=False),
    "t5": lambda documents: train_unigram(documents, vocab_size=400, family="t5"),
}


@pytest.mark.parametrize("family", TRAINERS)
def test_training_has_one_outcome_that_is_loaded_as_it_was_saved(family: str, tmp_path: Path):
    documents = [*Corpus([EMBEDDED])][:40]
    first, second = (TRAINERS[family](documents) for _ in range(2))
    assert first.tokens == second.tokens
    assert first.fingerprint == second.fingerprint
    first.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.fingerprint, loaded.template, loaded.settings) == (first.fingerprint, first.template, first.settings)
    assert loaded.encode_batch(TEXTS) == first.encode_batch(TEXTS)
    assert loaded.special_ids == first.special_ids
    text = "the file is read"
    assert loaded.decode(loaded.encode_batch([text])[0]) == text


def test_special_tokens_of_trained_vocabularies():
    documents = [*Corpus([EMBEDDED])][:20]
    begins = {family: train(documents).tokens[:5] for family, train in TRAINERS.items()}
    assert begins["roberta"] == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert begins["gpt2"] == ["<|endoftext|>", "!", '"', "#", "$"]
    assert begins["albert"] == begins["albert-cased"] == ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    assert begins["t5"][:3] == ["<pad>", "</s>", "<unk>"]
    with pytest.raises(DataError, match=r"A vocabulary of 261 pieces: too small.* 256 bytes alone take 261"):
        train_byte_bpe(documents, vocab_size=261)


def test_pieces_are_learnt_from_lines_without_blank_lines_too(tmp_path: Path):
    # One paragraph of 80 kB, which SentencePiece would skip; its last words count too.
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(14_000)]
    (tmp_path / "lines.txt").write_text("\n".join([*words, *["zebra"] * 2_000]))
    tokenizer = train_tokenizer("unigram", Corpus([str(tmp_path / "lines.txt")]), vocab_size=60, family="t5")
    assert "▁zebra" in tokenizer.tokens
    with pytest.raises(DataError, match="family marian: unigram tokenizers are trained as albert or t5"):
        train_tokenizer("unigram", Corpus([str(tmp_path / "lines.txt")]), vocab_size=40, family="marian")


@pytest.mark.parametrize("text", ["ab " * 50_000, "ab" * 70_000, "é" * 40_000, "short"])
def test_long_texts_are_cut_at_spaces(text: str):
    parts = [*cut_at_spaces(text)]
    assert "".join(parts) == text
    assert all(len(part.encode()) <= LONGEST for part in parts)
    assert all(part.endswith(" ") for part in parts[:-1]) or " " not in text


def test_an_unknown_class_is_refused(tmp_path: Path):
    settings = {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab"}
    with pytest.raises(DataError, match=r"the tokenizer_class 'BertJapaneseTokenizer' is not implemented"):
        load_tokenizer(bert_folder(tmp_path, tokenizer_config=settings))


@pytest.mark.parametrize("text", ["[]", "null", "{", "1" * 5000, "[" * 100_000])
def test_settings_that_are_no_object_are_refused(tmp_path: Path, text: str):
    (bert_folder(tmp_path) / "tokenizer_config.json").write_text(text)
    with pytest.raises(DataError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        {"normalizer": 5},
        {"added_tokens": [5]},
        {"added_tokens": {"id": "x"}},
        {"model": {"type": "WordPiece", "vocab": None}},
        {"model": []},
        {"model": {"type": "WordPiece", "vocab": {"[PAD]": -1}, "unk_token": "[UNK]"}},
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, damage: dict, named: bool):
    load_tokenizer(bert_folder(tmp_path)).save(tmp_path / "saved")
    path = tmp_path / "saved" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    if not named:
        (tmp_path / "saved" / "tokenizer_config.json").unlink()
    with pytest.raises(DataError):
        load_tokenizer(tmp_path / "saved")


def test_a_unigram_tokenizer_without_an_unknown_piece_is_refused(tmp_path: Path):
    load_tokenizer(FIXTURES / "t5").save(tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).unlink()
    assert load_tokenizer(tmp_path).encode_batch(["the"]) == load_tokenizer(FIXTURES / "t5").encode_batch(["the"])
    said = json.loads((tmp_path / "tokenizer.json").read_text())
    said["model"]["unk_id"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(DataError, match="a Unigram tokenizer without unk_id"):
        load_tokenizer(tmp_path)


def test_blank_lines_and_carriage_returns_of_a_vocabulary(tmp_path: Path):
    (tmp_path / "vocab.txt").write_bytes("\n".join([*SPECIAL, "he\rhe", "said", "", ""]).encode())
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.encode_batch(["said"])) == (7, [[6]])
    (tmp_path / "vocab.txt").write_bytes("\r\n".join([*SPECIAL, "he", "said", ""]).encode())
    assert load_tokenizer(tmp_path).encode_batch(["said"]) == [[6]]
