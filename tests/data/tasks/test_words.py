"""Running text is split into words as training data is."""

from itertools import pairwise

import pytest

from bestiary.data.tasks.tagging import read_conll, read_conllu
from bestiary.data.tasks.words import SPLITS, learnt_splits, word_spans


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Ada Lovelace lived in London .", "Ada|Lovelace|lived|in|London|."),
        ("Mr. Smith's U.S. office (in London), costs", "Mr.|Smith's|U.S.|office|(|in|London|)|,|costs"),
        ("$1,234.50!!! 5%", "$|1,234.50|!!!|5|%"),
        ("See http://a.b/c?d=1. @paul #tag", "See|http://a.b/c?d=1|.|@paul|#tag"),
        ("e-mail a@b.com and/or AT&T", "e-mail|a@b.com|and/or|AT&T"),
        ("“yes,no” at 10:30...", "“|yes|,|no|”|at|10:30|..."),
        ("हिन्दी में।", "हिन्दी|में|।"),
        (" \t\u00a0", ""),
        ("- # @@ \u200b", "-|#|@@|\u200b"),
    ],
)  # fmt: skip
def test_punctuation_stands_apart_where_it_is_none_of_the_word(text, words):
    spans = word_spans(text)
    assert [text[start:stop] for start, stop in spans] == [word for word in words.split("|") if word]
    assert all(a[1] <= b[0] for a, b in pairwise(spans))


def test_what_else_stands_apart_is_the_data_s_to_say():
    text = "He can't see a well-known dog's tail."

    def words(*splits: str) -> list[str]:
        return [text[start:stop] for start, stop in word_spans(text, splits)]

    assert words() == text.split()
    assert words(*SPLITS) == ["He", "ca", "n't", "see", "a", "well", "-", "known", "dog", "'s", "tail", "."]
    assert words("punctuation", "clitics") == ["He", "ca", "n't", "see", "a", "well-known", "dog", "'s", "tail", "."]
    assert learnt_splits([words(*SPLITS)]) == SPLITS
    assert learnt_splits([words("punctuation")]) == ("punctuation",)
    assert learnt_splits([["No,", "it", "can't", "be!"]]) == ()
    assert learnt_splits([]) == ("punctuation",)


def test_the_real_data(shared):
    data = shared / "data"
    assert learnt_splits(s.words for s in read_conll(data / "wnut17" / "dev.conll").sentences) == ("punctuation",)
    path = data / "ud_ewt" / "en_ewt-ud-dev.conllu"
    sentences = read_conllu(path).sentences
    splits = learnt_splits(sentence.words for sentence in sentences)
    texts = [line.removeprefix("# text = ") for line in path.read_text().splitlines() if line.startswith("# text = ")]
    found = [tuple(text[start:stop] for start, stop in word_spans(text, splits)) for text in texts]
    same = sum(words == sentence.words for words, sentence in zip(found, sentences, strict=True))
    assert same / len(sentences) > 0.88
