"""Show what a pretrained model predicts for masked words."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...data import Tokenizer

LONGEST = 40  # maximum number of tokens to show per text
EVERY = 9  # about one whole word per this many tokens is masked


def fill_in(
    apply: Callable[..., Any], params: Any, tokenizer: Tokenizer, rows: dict[str, np.ndarray], count: int = 4
) -> list[str]:
    """Mask whole words of held-out text and let the model predict them.

    Args:
        apply: (params, batch) -> logits of every token [B, L, V].
        params: parameters of the model.
        tokenizer: its tokenizer.
        rows: a batch of held-out rows; the first example of each row is used.
        count: maximum number of texts.

    Returns:
        One line per text, with [prediction probability, `ok` or the masked word] for each masked word.
    """
    after = tokenizer.template.after
    lengths = (rows["segment_ids"] == 1).sum(1)
    longest = min(LONGEST, rows["input_ids"].shape[1])
    chosen = np.flatnonzero(lengths >= 12)[:count]
    if not len(chosen):
        return []
    ids = np.full((len(chosen), longest), tokenizer.pad_id, np.int32)
    types, segments = np.zeros_like(ids), np.zeros_like(ids)
    for row, number in enumerate(chosen):
        length = min(lengths[number], longest)
        first = int(np.argmax(rows["segment_ids"][number] == 1))
        ids[row, :length] = rows["input_ids"][number, first : first + length]
        types[row, :length] = rows["token_type_ids"][number, first : first + length]
        segments[row, :length] = 1
        if length < lengths[number]:
            ids[row, length - len(after) : length] = after

    def word(token: int) -> str:
        return tokenizer.decode([int(token)]).strip()

    # A word to mask is one token that is neither special nor continued nor punctuation.
    alone = ~tokenizer.special[ids] & ~tokenizer.continuation[ids]
    alone[:, :-1] &= ~tokenizer.continuation[ids[:, 1:]]
    alone &= np.vectorize(lambda token: word(token).isalnum(), otypes=[bool])(ids)
    hidden = np.zeros_like(alone)
    for row, candidates in zip(hidden, alone, strict=True):
        last = -EVERY // 2
        for place in np.flatnonzero(candidates):
            if place - last >= EVERY:
                row[place], last = True, place
    masked = np.where(hidden, tokenizer.mask_id, ids)

    @jax.jit
    def guess(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        probabilities = jax.nn.softmax(apply(params, batch).astype(jnp.float32))
        return probabilities.max(-1), probabilities.argmax(-1)

    batch = {"input_ids": masked, "segment_ids": segments, "token_type_ids": types}
    sure, guessed = jax.device_get(guess(params, batch))
    return [
        " ".join(_words(tokenizer, *row))
        for row in zip(ids.tolist(), hidden.tolist(), guessed.tolist(), sure.tolist(), strict=True)
    ]


def _words(
    tokenizer: Tokenizer, ids: list[int], hidden: list[bool], guessed: list[int], sure: list[float]
) -> Iterator[str]:
    """Yield the words of a text, `|` between two texts, and the predictions.

    A text that begins within a word begins with `…`.
    """
    word: list[int] = []
    apart, begun = False, False

    def shown(tokens: list[int]) -> str:
        return tokenizer.decode(tokens).strip()

    def finished() -> Iterator[str]:
        text = shown(word) if word else ""
        if text:  # "▁" alone is a token too
            yield f"…{text.removeprefix('##')}" if tokenizer.continuation[word[0]] else text
        word.clear()

    for token, masked, guess, probability in zip(ids, hidden, guessed, sure, strict=True):
        if tokenizer.special[token] and token != tokenizer.special_ids.get("unk"):
            yield from finished()
            apart = begun
            continue
        if masked or not tokenizer.continuation[token]:
            yield from finished()
        if apart:
            yield "|"
        apart, begun = False, True
        if masked:
            right = "ok" if guess == token else f"for {shown([token])}"
            yield f"[{shown([guess]) or tokenizer.tokens[guess]} {probability:.0%}, {right}]"
        elif token == tokenizer.special_ids.get("unk"):
            yield from finished()
            yield tokenizer.tokens[token]
        else:
            word.append(token)
    yield from finished()
