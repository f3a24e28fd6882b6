"""Sentences end where a reader would end them."""

import pytest

from bestiary.data.corpus.sentences import split_sentences


@pytest.mark.parametrize(
    ("paragraph", "expected"),
    [
        ("Dr. Smith came. He left.", ["Dr. Smith came.", "He left."]),
        ("The value is 3.14. It's done!  Yes?", ["The value is 3.14.", "It's done!", "Yes?"]),
        ("os.path.join(a, b) is used. So is f.write().", ["os.path.join(a, b) is used.", "So is f.write()."]),
        ("a kind of lobster . It lives there .", ["a kind of lobster .", "It lives there ."]),
        ("", []),
        ("   ", []),
        ("no end", ["no end"]),
    ],
)
def test_english(paragraph: str, expected: list[str]):
    assert split_sentences(paragraph) == expected


def test_no_word_is_lost():
    paragraph = 'He said "no. Never!" and left... (See p. 5.) Then? "Yes." End'
    assert " ".join(split_sentences(paragraph)) == paragraph


def test_rules_of_the_language():
    assert split_sentences("Dr. Foo kam am 3. Mai. Ja.", "de") == ["Dr. Foo kam am 3. Mai.", "Ja."]
