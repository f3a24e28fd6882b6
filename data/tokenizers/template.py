"""The special tokens around a text or a pair, and their form in tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import tokenizers
from tokenizers import processors

from ..errors import DataError


@dataclass(frozen=True)
class Template:
    """The special tokens that a family puts around a text, `before A after`, or a pair, `before A between B after`.

    Attributes:
        before: ids of special tokens before A.
        between: ids of special tokens between A and B.
        after: ids of special tokens at the end.
        second_type: token type of B and the tokens after it; everything else has type 0.
    """

    before: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    second_type: int = 0

    def cost(self, pair: bool) -> int:
        """Return the number of special tokens of a text or a pair."""
        return len(self.before) + len(self.between) * pair + len(self.after)

    def join(self, first: Sequence[int], second: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
        """Return the ids and token types of a text or a pair, given without special tokens."""
        ids = [*self.before, *first]
        if second is None:
            ids += self.after
            return ids, [0] * len(ids)
        ids += self.between
        types = [0] * len(ids)
        ids += second
        ids += self.after
        types += [self.second_type] * (len(ids) - len(types))
        return ids, types

    def cut(self, first: int, second: int | None, most: int) -> tuple[int, int | None]:
        """Return the numbers of tokens to keep of a text or a pair, so that there are at most `most` tokens in total.

        The longer text of a pair is truncated first, as in the reference implementation.

        Raises:
            DataError: `most` is less than the number of special tokens.
        """
        room = most - self.cost(second is not None)
        if room < 0:
            raise DataError(f"A length of {most} tokens is too short: special tokens alone take {most - room} of them.")
        if second is None or first + second <= room:
            return min(first, room), second
        shorter, longer = sorted((first, second))
        longer = shorter if shorter > room else max(shorter, room - shorter)
        if shorter + longer > room:
            shorter, longer = room // 2, room - room // 2
        return (shorter, longer) if first <= second else (longer, shorter)


def token_ids(backend: tokenizers.Tokenizer, tokens: Sequence[str], where: str) -> list[int]:
    """Return the ids of a template's tokens.

    Raises:
        DataError: the vocabulary lacks one.
    """
    found = {token: backend.token_to_id(token) for token in tokens}
    missing = ", ".join(token for token, number in found.items() if number is None)
    if missing:
        raise DataError(f"{where}: the vocabulary has no {missing}, a special token of every input.")
    return [number for number in (found[token] for token in tokens) if number is not None]


def bert_template(backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str], where: str) -> Template:
    """Return the template `[CLS] A [SEP] B [SEP]`, with token types 0 and 1 (BERT, ALBERT); `backend` is given it too.

    Raises:
        DataError: the vocabulary lacks these tokens.
    """
    cls, sep = special_tokens["cls"], special_tokens["sep"]
    before, after = token_ids(backend, (cls, sep), where)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(cls, before), (sep, after)],
    )
    return Template((before,), (after,), (after,), second_type=1)


def roberta_template(
    backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str], where: str, *, add_prefix_space: bool
) -> Template:
    """Return the template `<s> A </s></s> B </s>`, all with token type 0; `backend` is given it too.

    Raises:
        DataError: the vocabulary lacks these tokens.
    """
    cls, sep = special_tokens["cls"], special_tokens["sep"]
    before, after = token_ids(backend, (cls, sep), where)
    backend.post_processor = processors.RobertaProcessing(
        (sep, after), (cls, before), trim_offsets=True, add_prefix_space=add_prefix_space
    )
    return Template((before,), (after, after), (after,))


def read_template(stated: Any, backend: tokenizers.Tokenizer, where: str) -> Template:
    """Read the template in the post_processor of a tokenizer.json; empty if there is none.

    Raises:
        DataError: it is not of the form `before A after` and `before A between B after`, or its tokens have other ids
            in the vocabulary.
    """
    if stated is None:
        return Template()
    try:
        template, named = _parse(stated)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: expected special tokens before, between and after texts, found {error}.") from None
    for token, number in named.items():
        if backend.token_to_id(token) != number:
            has = backend.token_to_id(token)
            raise DataError(f"{where}: the id of {token!r} is {number} there, but {has} in the vocabulary.")
    return template


def _parse(stated: Mapping[str, Any]) -> tuple[Template, dict[str, int]]:
    """Return (the template, the ids of its tokens)."""
    kind = stated["type"]
    if kind == "Sequence":
        found = [_parse(step) for step in stated["processors"]]
        return next((some for some in found if some[0] != Template()), (Template(), {}))
    if kind == "ByteLevel":
        return Template(), {}
    if kind in ("BertProcessing", "RobertaProcessing"):
        (sep_token, sep), (cls_token, cls) = stated["sep"], stated["cls"]
        between = (sep,) if kind == "BertProcessing" else (sep, sep)
        second = int(kind == "BertProcessing")
        return Template((cls,), between, (sep,), second), {cls_token: cls, sep_token: sep}
    if kind == "TemplateProcessing":
        return _parse_pieces(stated)
    raise ValueError(f"the type {kind}")


def _parse_pieces(stated: Mapping[str, Any]) -> tuple[Template, dict[str, int]]:
    tokens = stated["special_tokens"]
    named: dict[str, int] = {}

    def parts(pieces: Sequence[Any], texts: str) -> tuple[list[list[int]], list[list[int]]]:
        """Return (ids, token types) before, between and after the texts; a text's own type ends the part before it."""
        ids: list[list[int]] = [[]]
        types: list[list[int]] = [[]]
        order = ""
        for piece in pieces:
            if "Sequence" in piece:
                order += piece["Sequence"]["id"]
                types[-1].append(piece["Sequence"]["type_id"])
                ids.append([])
                types.append([])
            else:
                some = tokens[piece["SpecialToken"]["id"]]
                named.update(zip(some["tokens"], some["ids"], strict=True))
                ids[-1] += some["ids"]
                types[-1] += [piece["SpecialToken"]["type_id"]] * len(some["ids"])
        if order != texts:
            raise ValueError(f"the texts {order} for {texts}")
        return ids, types

    (before, after), single_types = parts(stated["single"], "A")
    (pair_before, between, pair_after), pair_types = parts(stated["pair"], "AB")
    if (before, after) != (pair_before, pair_after):
        raise ValueError("different tokens around a pair and around a single text")
    *between_types, second = pair_types[1]
    if any(chain(*single_types, pair_types[0], between_types)) or set(pair_types[2]) - {second}:
        raise ValueError("token types other than 0 up to the second text and one value from there on")
    return Template(tuple(before), tuple(between), tuple(after), second), named


def write_template(template: Template, backend: tokenizers.Tokenizer) -> Any:
    """Return the post_processor for a template, after a step that removes spaces before words from their spans."""
    trim = processors.ByteLevel(trim_offsets=True)
    if template == Template():
        return trim
    names = {number: token for token, number in backend.get_vocab().items()}
    before, between, after = (
        [names[number] for number in part] for part in (template.before, template.between, template.after)
    )
    second = template.second_type
    single = [*(f"{token}:0" for token in before), "$A:0", *(f"{token}:0" for token in after)]
    pair = [
        *(f"{token}:0" for token in before),
        "$A:0",
        *(f"{token}:0" for token in between),
        f"$B:{second}",
        *(f"{token}:{second}" for token in after),
    ]
    tokens = [(token, backend.token_to_id(token)) for token in dict.fromkeys([*before, *between, *after])]
    around = processors.TemplateProcessing(single=single, pair=pair, special_tokens=tokens)
    return processors.Sequence([trim, around])
