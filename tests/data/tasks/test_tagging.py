"""CoNLL columns in IOB1 and IOB2, CoNLL-U, and words whose tag sits on the first subword."""

from pathlib import Path

import numpy as np
import pytest

from bestiary.data import DataError, load_tokenizer
from bestiary.data.tasks.tagging import check_tags, read_conll, read_conllu, tag_set, tokenise_words

UNCASED = Path(__file__).parents[1] / "fixtures" / "wordpiece" / "uncased"
BYTES = Path(__file__).parents[1] / "fixtures" / "tokenizers" / "byte_bpe"


def tags(path: Path, **options) -> list[tuple[str, ...] | None]:
    return [sentence.tags for sentence in read_conll(path, **options).sentences]


def test_blank_lines_may_hold_a_tab_and_words_may_be_odd(file):
    path = file("train.conll", "@paul\tO\nEmpire\tB-loc\n\t\n\t \n-DOCSTART-\tO\n\n\u3000\tO\n\xa0\tB-x\r\n#tag\tO")
    first, second = read_conll(path).sentences
    assert (first.words, first.tags, first.lines) == (("@paul", "Empire"), ("O", "B-loc"), (1, 2))
    assert (second.words, second.tags) == (("\u3000", "\xa0", "#tag"), ("O", "B-x", "O"))
    assert second.where(2) == f"{path}, line 9"


CONLL_2003 = """-DOCSTART- -X- -X- O

EU NNP I-NP I-ORG
rejects VBZ I-VP O
German JJ I-NP I-MISC
Jewish JJ I-NP B-MISC
Peter NNP I-NP I-PER
Blackburn NNP I-NP I-PER
"""


def test_iob1_becomes_iob2(file):
    path = file("eng.train", CONLL_2003)
    (found,) = tags(path, scheme="iob1")
    assert found == ("B-ORG", "O", "B-MISC", "B-MISC", "B-PER", "I-PER")
    # Read for another column, and with words from the second.
    assert read_conll(path, scheme="iob1", word_column=1, tag_column=2).sentences[0].tags == (
        "B-NP", "B-VP", "B-NP", "I-NP", "I-NP", "I-NP"
    )  # fmt: skip


def test_an_i_that_goes_on_with_nothing_is_an_error_in_iob2_unless_repaired(file):
    path = file("train.conll", "a\tO\n\nb\tI-x\nc\tI-x\nd\tI-y\n")
    with pytest.raises(DataError) as error:
        read_conll(path)
    said = str(error.value)
    assert said.startswith(f"{path}, line 3: I-x at the sentence's start")
    assert "--scheme iob1" in said
    assert "--repair" in said
    repaired = read_conll(path, repair=True)
    assert repaired.sentences[1].tags == ("B-x", "I-x", "B-y")
    assert repaired.repaired == 2
    with pytest.raises(DataError, match="line 2: I-y after B-x continues no entity"):
        read_conll(file("other.conll", "a\tB-x\nb\tI-y\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no sentences"),
        ("a\tO\nb\n", "line 2: expected 2 columns, as on line 1, found 1"),
        ("a\nb\n", "line 1: expected at least 2 columns"),
        ("EU\tB-ORGrejects\tO\nb\tO\n", "line 2: expected 3 columns, as on line 1, found 2"),
        ("a\tO\r\tO\n", "line 1: a carriage return within the line"),
        ("a O\rb B-x\r", "lines end in a carriage return alone"),
        ("\tO\n", "line 1: column 0 is empty"),
        ("\xa0\n", "line 1: expected at least 2 columns"),
        ("a\tB-x\0\n", "the tag 'B-x\\x00' is not"),
        ("a\tO\nb\tS-x\n", "line 2: the tag 'S-x' is not of IOB1 or IOB2"),
        ("a\tO\nb\tB-\n", "line 2: the tag 'B-' is not"),
    ],
)
def test_bad_columns_are_refused_with_their_line(file, text, message):
    path = file("bad.conll", text)
    with pytest.raises(DataError) as error:
        read_conll(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_only_space_and_tab_separate_columns(file):
    (sentence,) = read_conll(file("a.conll", "10\u00a0000  O\n\u3000 B-x\n")).sentences
    assert (sentence.words, sentence.tags) == (("10\u00a0000", "\u3000"), ("O", "B-x"))
    assert read_conll(file("b.conll", "New York \tB-loc\t\n")).sentences[0].words == ("New York",)


BIOES = "a\tB-x\nb\tI-x\nc\tE-x\nd\tS-x\ne\tO\nf\tS-y\n"


def test_bioes_becomes_iob2(file):
    assert tags(file("a.conll", BIOES), scheme="bioes") == [("B-x", "I-x", "I-x", "B-x", "O", "B-y")]
    for text, message in (
        (BIOES.replace("c\tE", "c\tI"), "line 4: no E-x ends the entity before"),
        (BIOES.replace("b\tI-x", "b\tI-y"), "line 2: no E-x ends"),
        ("a\tE-x\n", "line 1: E-x continues no entity"),
        ("a\tO\nb\tB-x\n", "line 2: no E-x ends"),
        ("a\tL-x\n", "line 1: the tag 'L-x' is not of BIOES"),
    ):
        with pytest.raises(DataError, match=message):
            read_conll(file("bad.conll", text), scheme="bioes")
    repaired = read_conll(file("bad.conll", "a\tB-x\nb\tI-y\nc\tE-y\n"), scheme="bioes", repair=True)
    assert (repaired.sentences[0].tags, repaired.repaired) == (("B-x", "B-y", "I-y"), 1)
    with pytest.raises(DataError, match="pass --scheme bioes"):
        read_conll(file("b.conll", "a\tS-x\n"))


def test_comments_by_what_they_begin_with(file):
    text = "# id 7\tdomain=en\n#\tO\nwins\tB-x\n\n# id 8\tdomain=en\n\n"
    assert read_conll(file("a.conll", text), comment="# id").sentences[0].words == ("#", "wins")
    with pytest.raises(DataError, match="line 1: the tag 'domain=en'"):
        read_conll(file("a.conll", text))


def test_a_file_without_the_column_of_the_tags_has_none(file):
    words = file("test.conll", "a NN\nb DT\n")
    assert tags(words, columns=3) == [None]
    assert read_conll(words, columns=3, word_column=-3).sentences[0].words == ("a", "b")
    assert tags(file("some.conll", "a NN O\n"), columns=3) == [("O",)]
    bare = file("test.conllu", CONLLU.replace("AUX", "_").replace("PART", "_").replace("VERB", "_"))
    assert read_conllu(bare, labelled=None).sentences[0].tags is None
    with pytest.raises(DataError, match="line 3: the word has no UPOS"):
        read_conllu(bare)


CONLLU = """# text = Don't go there.
1-2\tDon't\t_\t_\t_\t_\t_\t_\t_\t_
1\tDo\tdo\tAUX\tVB\t_\t3\taux\t_\t_
2\tn't\tnot\tPART\tRB\t_\t3\tadvmod\t_\t_
3\tgo there\tgo\tVERB\tVB\t_\t0\troot\t_\t_
3.1\twill\twill\tAUX\t_\t_\t_\t_\t_\t_

# a comment alone
"""


NUMBERS = (
    (("\n3\t", "\n1\t"), "line 5: the number is 1; the next in the sentence is 3"),
    (("\n3\t", "\n3.\t"), "line 5: expected a word's number, found '3.'"),
    (("\n3\t", "\n-3\t"), "line 5: expected a word's number, found '-3'"),
    (("\n3\t", "\n\u0663\t"), "line 5: expected a word's number"),
    (("1-2", "2-3"), "line 2: the number is 2-3; the next in the sentence is 1-2"),
    (("1-2", "1-5"), "line 6: the sentence ends with word 3, within a multiword token"),
    (("3.1", "3.2"), "line 6: the number is 3.2; the next in the sentence is 3.1"),
    (("\tgo there\t", "\t\t"), "line 5: field 2 is empty"),
    (("VERB", "Verb"), "line 5: 'Verb' is not a universal part of speech: ADJ, ADP"),
    (("# a comment", "4\tx"), "line 8: expected CoNLL-U's 10 fields"),
)


def test_conllu_leaves_out_multiword_tokens_and_empty_nodes(file):
    path = file("x.conllu", CONLLU)
    (sentence,) = read_conllu(path).sentences
    assert sentence.words == ("Do", "n't", "go there")
    assert sentence.tags == ("AUX", "PART", "VERB")
    assert read_conllu(path, column="xpos").sentences[0].tags == ("VB", "RB", "VB")
    for bad, message in (
        ("1\tx\tx\tNOUN\n", "line 1: expected CoNLL-U's 10 fields"),
        ("1\tx\tx\t_" + "\t_" * 6, "line 1: the word has no UPOS"),
        ("x" + "\t_" * 9, "line 1: expected a word's number"),
        *((CONLLU.replace(*change), message) for change, message in NUMBERS),
    ):
        with pytest.raises(DataError, match=message):
            read_conllu(file("bad.conllu", bad))


def test_labels_are_in_one_order_and_unknown_ones_are_named(file):
    train = read_conll(file("train.conll", "a\tB-y\nb\tI-y\nc\tB-x\n")).sentences
    labels = tag_set(train, entities=True)
    assert labels == ("O", "B-x", "I-x", "B-y", "I-y")
    dev = file("dev.conll", "a\tO\nb\tB-z\n")
    with pytest.raises(DataError, match=r"dev.conll, line 2: the tag 'B-z' is not among those trained on: O, B-x"):
        check_tags(read_conll(dev).sentences, labels)


def test_every_word_has_one_first_token_and_long_sentences_are_cut_between_words(file):
    tokenizer = load_tokenizer(UNCASED)
    lines = [["unaffable"] * 9, ["the", "\u200b", "unaffable"], ["the"]]
    text = "\n\n".join("\n".join(f"{word}\tO" for word in words) for words in lines)
    sentences = read_conll(file("train.conll", text)).sentences
    wordwise = {word: tokenizer.encode_batch([word])[0] or [tokenizer.unk_id] for words in lines for word in words}
    assert len(wordwise["unaffable"]) > 1
    pieces = tokenise_words(tokenizer, sentences, max_length=2 + 4 * len(wordwise["unaffable"]))
    assert (pieces.split, pieces.truncated) == (1, 0)
    covered: dict[int, list[int]] = {}
    for ids, first, number, (start, stop) in zip(pieces.ids, pieces.first, pieces.sentence, pieces.words, strict=True):
        words = sentences[number].words[start:stop]
        covered.setdefault(int(number), []).extend(range(start, stop))
        assert ids.tolist() == [tokenizer.cls_id, *(i for word in words for i in wordwise[word]), tokenizer.sep_id]
        starts = np.cumsum([1, *(len(wordwise[word]) for word in words)])[:-1]
        assert np.flatnonzero(first).tolist() == starts.tolist()
    assert covered == {number: list(range(len(words))) for number, words in enumerate(lines)}
    # A word that alone is too long keeps its first tokens.
    short = tokenise_words(tokenizer, sentences[2:] + sentences[:1], max_length=3)
    assert all(len(ids) == 3 for ids in short.ids)
    assert short.truncated == 9 * (len(wordwise["unaffable"]) - 1)


def test_the_real_files(shared: Path):
    data = shared / "data"
    for split, count in (("train", 3394), ("dev", 1009), ("test", 1287)):
        found = read_conll(data / "wnut17" / f"{split}.conll")
        assert (len(found.sentences), found.repaired) == (count, 0)
    found = read_conllu(data / "ud_ewt" / "en_ewt-ud-dev.conllu")
    assert len(found.sentences) == 2001
    assert len(tag_set(found.sentences, entities=False)) == 17


def test_words_of_byte_level_bpe_stand_after_a_space(file):
    tokenizer = load_tokenizer(BYTES)
    sentences = read_conll(file("train.conll", "the\tO\nfile\tO\n,\tO\nfiles\tO\n")).sentences
    pieces = tokenise_words(tokenizer, sentences, max_length=40)
    (ids,) = pieces.ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == " the file , files"
    assert (ids[0], ids[-1]) == (tokenizer.cls_id, tokenizer.sep_id)
    assert pieces.first[0].sum() == 4
    assert all(tokenizer.tokens[i].startswith("Ġ") for i in ids[pieces.first[0]])
    assert not pieces.types[0].any()
