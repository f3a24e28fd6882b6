"""Markup is taken out, words are kept."""

import random
import re
import time

import pytest

from bestiary.data.corpus.delimiters import without_code_marks, without_emphasis, without_strikethrough
from bestiary.data.corpus.markup import paragraphs


def test_wrapped_lines_are_joined_and_blank_lines_part_paragraphs():
    text = "One line\n  goes on\there.\n\n \t\nAnother one.\n"
    assert paragraphs(text, "wrapped") == ["One line goes on here.", "Another one."]


def test_lines_are_paragraphs():
    assert paragraphs("One.\n\n  Two  words.\nThree.", "lines") == ["One.", "Two words.", "Three."]


@pytest.mark.parametrize(
    ("markdown", "expected"),
    [
        ("# Title: A Book\n\n## Author ##\ntext", ["Title: A Book", "Author", "text"]),
        ("a *strong* **very** ***most*** word", ["a strong very most word"]),
        ("_PREFACE_ and snake_case_name and __both__", ["PREFACE and snake_case_name and both"]),
        ("2 * 3 * 4 and a*", ["2 * 3 * 4 and a*"]),
        ("see [the page](http://x.org/a_(b)) and ![a picture](p.png)", ["see the page and a picture"]),
        ("see [the page][1]\n\n[1]: http://x.org", ["see the page"]),
        ("<http://x.org> <b>bold</b> <!-- hidden\nwords --> R&amp;D", ["http://x.org bold R&D"]),
        ("> quoted\n> lines\n\n>> twice", ["quoted lines", "twice"]),
        ("- one\n- two\n  goes on\n\n3. three", ["one", "two goes on", "three"]),
        ("It was in\n1990. That year", ["It was in 1990. That year"]),
        ("Setext\n======\nbody\n\n---\n\n* * *\nend", ["Setext", "body", "end"]),
        ("| a | b |\n|---|---|\n| c | d |", ["a b", "c d"]),
        ("```python\nx = *y*\n```\nafter `code`", ["x = *y*", "after code"]),
        ("---\ntitle: x\n---\nbody", ["body"]),
        (r"\*not emphasis\* and 5\. five", ["*not emphasis* and 5. five"]),
        ('"He _said_ so"--and **left**.', ['"He said so"--and left.']),
    ],
)
def test_markdown(markdown: str, expected: list[str]):
    assert paragraphs(markdown, "markdown") == expected


@pytest.mark.parametrize(
    ("take_out", "pattern", "characters"),
    [
        (without_code_marks, r"(`+)(?P<text>.+?)\1", "```a b"),
        (
            lambda text: without_emphasis(text, "*"),
            r"(?<!\\)(\*{1,3})(?=[^\s*])(?P<text>.+?)(?<=[^\s*\\])\1",
            "**_a\u00e9 \\.",
        ),
        (
            lambda text: without_emphasis(text, "_"),
            r"(?<![\w\\])(_{1,3})(?=[^\s_])(?P<text>.+?)(?<=[^\s_\\])\1(?!\w)",
            "__*a\u00e9 \\.",
        ),
        (without_strikethrough, r"~~(?=\S)(?P<text>.+?)(?<=\S)~~", "~~~a b"),
    ],
)
def test_delimiters_are_taken_out_as_by_regular_expressions(take_out, pattern: str, characters: str):
    draw = random.Random(0)
    for _ in range(20_000):
        text = "".join(draw.choice(characters) for _ in range(draw.randint(1, 16)))
        assert take_out(text) == re.sub(pattern, r"\g<text>", text), text


@pytest.mark.parametrize("lone", ["*word ", "**word ", "_word ", "`word ``other ", "~~word ", "a* **b "])
def test_lone_marks_take_no_longer_than_words(lone: str):
    text = lone * (200_000 // len(lone))
    start = time.process_time()
    (paragraph,) = paragraphs(text, "markdown")
    assert time.process_time() - start < 5
    assert "word" in paragraph or "b" in paragraph


def test_wikitext_headings_lose_their_marks_and_split_tokens_are_joined():
    text = " = A Title = \n \n It was 1 @,@ 000 @.@ 5 km @-@ long , <unk> . \n = = A Section = = \n = x + 1 \n"
    expected = ["A Title", "It was 1,000.5 km-long , <unk> .", "A Section", "= x + 1"]
    assert paragraphs(text, "wikitext") == expected


def test_docstrings_keep_prose_and_leave_code_out():
    text = """Compute the *closest* match, see :func:`difflib.get_close_matches` [1]_.

Some Section
============

    >>> compute(1)
    2

* First ``item`` of a list
* Second item, which
  goes on

   call ::= primary "(" [argument_list] ")"

.. note:: Be careful with this one.
"""
    assert paragraphs(text, "docstrings") == [
        "Compute the closest match, see difflib.get_close_matches.",
        "First item of a list",
        "Second item, which goes on",
        "Be careful with this one.",
    ]
