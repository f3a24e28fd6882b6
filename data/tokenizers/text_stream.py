"""The text of tokens as they are generated: whole characters, and nothing of a string that ends the text."""

from __future__ import annotations

from collections.abc import Sequence

from .tokenizer import Tokenizer

_CONTEXT = 8  # tokens before the new ones that are decoded with them, since some tokenizers join them by rules
_REPLACED = "\ufffd"  # what bytes that are no character decode to


class TextStream:
    """The text after `before`, piece by piece.

    Bytes that may be the beginning of a character are held back until it is whole, and so is text that may be the
    beginning of a stop string. What is still held back at the end is dropped if it is part of a character.

    Args:
        tokenizer: the tokenizer.
        before: the tokens that the text continues.
        stop: strings that end the text, and are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = (), stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens = list(before)
        self._shown, self._from = len(self._tokens), max(0, len(self._tokens) - _CONTEXT)
        self._held = ""
        self.text = ""
        """the text so far"""
        self.stopped = False
        """whether a stop string has occurred"""

    def push(self, tokens: Sequence[int]) -> str:
        """Add tokens, and return the new text."""
        new = ""
        for token in tokens:
            if not self.stopped:
                self._tokens.append(token)
                new += self._grow(self._whole())
        return new

    def finish(self) -> str:
        """End the text, and return the part of it that was held back."""
        held, self._held = "" if self.stopped else self._held, ""
        self.text += held
        return held

    def _decode(self, first: int, last: int) -> str:
        return self._tokenizer.decode(self._tokens[first:last], skip_special_tokens=True)

    def _whole(self) -> str:
        """Return the text of the tokens that were not shown, if it ends with a whole character."""
        whole = self._decode(self._from, len(self._tokens))
        if whole.endswith(_REPLACED):
            return ""
        text = whole[len(self._decode(self._from, self._shown)) :]
        self._from, self._shown = max(self._from, self._shown - _CONTEXT), len(self._tokens)
        return text

    def _grow(self, text: str) -> str:
        held = self._held + text
        places = [place for place in (held.find(stop) for stop in self._stop) if place >= 0]
        if places:
            self.stopped, held, keep = True, held[: min(places)], 0
        else:
            keep = max((_overlap(held, stop) for stop in self._stop), default=0)
        new, self._held = held[: len(held) - keep], held[len(held) - keep :]
        self.text += new
        return new


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
