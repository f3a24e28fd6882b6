"""Show what a pretrained model predicts for masked words."""

from collections.abc import Callable
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
        apply: ({"params": params}, input_ids, segment_ids) -> logits of every token [B, L, V].
        params: parameters of the model.
        tokenizer: its tokenizer.
        rows: a batch of held-out rows; the first example of each row is used.
        count: maximum number of texts.

    Returns:
        One line per text, with [prediction probability, `ok` or the masked word] for each masked word.
    """
    texts = [row[segments == 1] for row, segments in zip(rows["input_ids"], rows["segment_ids"], strict=True)]
    texts = [np.append(text[: LONGEST - 1], tokenizer.sep_id) for text in texts if len(text) >= 12][:count]
    if not texts:
        return []
    ids = np.full((len(texts), LONGEST), tokenizer.pad_id, np.int32)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text

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
    def guess(params: Any, ids: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = apply({"params": params}, ids, segments)
        probabilities = jax.nn.softmax(logits.astype(jnp.float32))
        return probabilities.max(-1), probabilities.argmax(-1)

    sure, guessed = jax.device_get(guess(params, masked, (ids != tokenizer.pad_id).astype(np.int32)))
    lines = []
    for row in range(len(ids)):
        words: list[str] = []
        for place in np.flatnonzero(~tokenizer.special[ids[row]]):
            text = word(ids[row, place])
            if hidden[row, place]:
                found = word(guessed[row, place])
                mark = "ok" if guessed[row, place] == ids[row, place] else f"for {text}"
                words.append(f"[{found} {sure[row, place]:.0%}, {mark}]")
            elif tokenizer.continuation[ids[row, place]] and words:
                words[-1] += text.removeprefix("##")
            else:
                words.append(text)
        lines.append(" ".join(words))
    return lines
