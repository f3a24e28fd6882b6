"""Convert text with markup to plain paragraphs.

A paragraph is one line of running text: hard-wrapped lines are joined, runs of white space become one space, and markup
without words is removed. Headings and list items are separate paragraphs, so that no sentence runs across them.
"""

from __future__ import annotations

import html
import re
from typing import Literal

from .delimiters import without_code_marks, without_emphasis, without_strikethrough

Markup = Literal["wrapped", "lines", "markdown", "wikitext", "docstrings", "verbatim"]


def paragraphs(text: str, markup: Markup) -> list[str]:
    """Return the non-empty paragraphs of `text`.

    Args:
        text: the text.
        markup: one of
            "wrapped": plain text; blank lines separate paragraphs, whose lines are joined.
            "lines": plain text; every line is a paragraph.
            "markdown": `#` headings, emphasis, links, lists, tables, HTML tags; the text of code blocks is kept.
            "wikitext": WikiText; every line is a paragraph, ` = Heading = ` loses its marks, and ` @-@ `, ` @,@ `,
                ` @.@ ` (hyphens and separators within words and numbers) are joined again. `<unk>` is kept.
            "docstrings": reStructuredText as in Python's documentation; examples (`>>>`), grammar, tables and code are
                removed.
            "verbatim": the text as it is, in one paragraph.
    """
    return _READERS[markup](text)


def _wrapped(text: str) -> list[str]:
    return _joined(re.split(r"\n[^\S\n]*\n", text))


def _lines(text: str) -> list[str]:
    return _joined(text.split("\n"))


def _joined(blocks: list[str]) -> list[str]:
    return [line for block in blocks if (line := " ".join(block.split()))]


# --- WikiText ---------------------------------------------------------------------------------------------------------

WIKITEXT_TITLE = re.compile(r" ?= [^=\s](?:[^=]|=(?! $))*? = ?")  # one `=` a side; a section has ` = = ` and more
_WIKITEXT_HEADING = re.compile(r"((?:= )+)(.*?)((?: =)+)")


def _wikitext(text: str) -> list[str]:
    found = []
    for line in _lines(re.sub(r" @([-,.])@ ", r"\1", text)):
        heading = _WIKITEXT_HEADING.fullmatch(line)
        found.append(heading[2] if heading and len(heading[1]) == len(heading[3]) else line)
    return [line for line in found if line]


# --- Markdown ---------------------------------------------------------------------------------------------------------

_FRONT_MATTER = re.compile(r"\A---\n(?:[\w-]+:.*\n|[ \t#-].*\n)*?---\n")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_QUOTE = re.compile(r"(?:\s{0,3}>\s?)+")
_FENCE = re.compile(r"\s{0,3}(```+|~~~+)")
_HEADING = re.compile(r"\s{0,3}#{1,6}\s+(.*)")
_RULE = re.compile(r"\s{0,3}(?:=+|-+|(?:\*\s*){3,}|(?:_\s*){3,}|(?:-\s*){3,})\s*")
_TABLE_RULE = re.compile(r"\s*\|?(?:\s*:?-+:?\s*\|)+(?:\s*:?-+:?\s*)?")
_DEFINITION = re.compile(r"\s{0,3}\[[^\]]+\]:\s+\S+.*")
_ITEM = re.compile(r"\s*(?:[-*+]|(\d{1,9})[.)])\s+(.*)")
_INLINE = [
    (re.compile(r"!?\[([^\[\]]*)\]\([^()]*(?:\([^()]*\)[^()]*)?\)"), r"\1"),  # [text](address), ![text](address)
    (re.compile(r"!?\[([^\[\]]+)\]\[[^\[\]]*\]"), r"\1"),  # [text][name]
    (re.compile(r"<((?:https?|ftp|mailto):[^<>\s]+)>"), r"\1"),
    (re.compile(r"</?[A-Za-z][^<>]*>"), " "),
]
_ESCAPE = re.compile(r"\\([\\`*_{}\[\]()#+\-.!>~|])")
_MAY_HAVE_INLINE = re.compile(r"[\[<`*_~\\]")


def _markdown_inline(text: str) -> str:
    if _MAY_HAVE_INLINE.search(text):
        for pattern, replacement in _INLINE:
            text = pattern.sub(replacement, text)
        text = without_strikethrough(without_emphasis(without_emphasis(without_code_marks(text), "*"), "_"))
        text = _ESCAPE.sub(r"\1", text)
    return html.unescape(text) if "&" in text else text


def _heading(text: str) -> str:
    """A heading's text without the `#` that may close it."""
    text = text.rstrip()
    shorter = text.rstrip("#")
    return shorter if shorter and shorter[-1].isspace() else text


def _markdown(text: str) -> list[str]:
    before, last, after = _FRONT_MATTER.sub("", text).rpartition("-->")  # nothing closes a comment after the last one
    text = _COMMENT.sub("", before + last) + after
    found: list[str] = []
    current: list[str] = []
    fence = ""

    def flush(inline: bool = True) -> None:
        if current:
            joined = " ".join(current)
            found.append(" ".join((_markdown_inline(joined) if inline else joined).split()))
            current.clear()

    for line in text.split("\n"):
        if fence:
            if line.strip().startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
                flush(inline=False)
            elif line.strip():
                current.append(line.strip())
            else:
                flush(inline=False)
            continue
        if ">" in line and (quote := _QUOTE.match(line)):
            line = line[quote.end() :]
        if not line or line.isspace():
            flush()
        elif opened := _FENCE.match(line):
            flush()
            fence = opened[1]
        elif heading := _HEADING.fullmatch(line):
            flush()
            current.append(_heading(heading[1]))
            flush()
        elif _RULE.fullmatch(line) or _DEFINITION.fullmatch(line):
            flush()
        elif "|" in line and _TABLE_RULE.fullmatch(line):
            continue
        # Only a list that starts with 1 can interrupt a paragraph (CommonMark 5.3): "... in\n1990. That year ..." is
        # prose.
        elif (item := _ITEM.fullmatch(line)) and (item[1] in (None, "1") or not current):
            flush()
            current.append(item[2])
        elif line.lstrip().startswith("|"):
            flush()
            current.append(line.replace("|", " "))
            flush()
        else:
            current.append(line)
    flush()
    return [paragraph for paragraph in found if paragraph]


# --- reStructuredText, as in docstrings -------------------------------------------------------------------------------

_UNDERLINE = re.compile(r"\s*([=\-~^\"'*+#<>.:_`])\1{2,}\s*")
_TABLE_LINE = re.compile(r"\s*(?:\+[-=+]+\+|\|.*\||=+(?:\s+=+)+|-+(?:\s+-+)+)\s*")
_DIRECTIVE = re.compile(r"\s*\.\. [\w:-]+::\s*")
_BULLET = re.compile(r"\s*(?:[-*+]|\d{1,2}[.)])\s+")
_DOC_INLINE = [
    (re.compile(r":[a-zA-Z:]+:`([^`]+)`"), r"\1"),
    (re.compile(r"(`{1,2})([^`]+)\1_{0,2}"), r"\2"),
    (re.compile(r"(?<![\w*])(\*{1,2})(?=[^\s*])([^*]+?)(?<=[^\s*])\1(?![\w*])"), r"\2"),
    (re.compile(r"\s?\[\w+\]_"), ""),
    (re.compile(r"::$"), ":"),
]
_WORDS = re.compile(r"[A-Za-z]{2,}")
_PROSE_FRACTION = 0.75  # least fraction of letters and spaces in prose; code, grammar and signatures have less


def _is_prose(paragraph: str) -> bool:
    plain = sum(character.isalpha() or character == " " for character in paragraph)
    return plain >= _PROSE_FRACTION * len(paragraph) and len(_WORDS.findall(paragraph)) >= 3


def _docstrings(text: str) -> list[str]:
    found: list[str] = []
    current: list[str] = []
    example = False

    def flush() -> None:
        if current:
            paragraph = " ".join(" ".join(current).split())
            for pattern, replacement in _DOC_INLINE:
                paragraph = pattern.sub(replacement, paragraph)
            if "::=" not in paragraph and _is_prose(paragraph):
                found.append(paragraph)
            current.clear()

    for line in text.split("\n"):
        stripped = line.strip()
        if not stripped:
            flush()
            example = False
        elif stripped.startswith((">>>", "... ")) or example:
            flush()
            example = True
        elif _UNDERLINE.fullmatch(line) or _TABLE_LINE.fullmatch(line):
            flush()
        else:
            if directive := _DIRECTIVE.match(line):
                flush()
                line = line[directive.end() :]
            elif bullet := _BULLET.match(line):
                flush()
                line = line[bullet.end() :]
            current.append(line)
    flush()
    return found


_READERS = {
    "wrapped": _wrapped,
    "lines": _lines,
    "markdown": _markdown,
    "wikitext": _wikitext,
    "docstrings": _docstrings,
    "verbatim": lambda text: [text],
}
