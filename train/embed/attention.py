"""Draw or store the attention weights of a pretrained encoder.

bestiary attention --model FOLDER --out page.html "The nurse said that she would help him."
bestiary attention --model FOLDER --layers 11 --heads 6 --out weights.npz < texts.txt
"""

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from ...data.errors import DataError
from ...data.files import check_output, replacing
from ...data.progress import counted
from ...data.reading import lines_of
from ...models.attention_maps import attention_maps
from ..attention_page import MOST, chosen_places, drawing, write_page
from ..progress import Progress
from .config import AttentionConfig
from .extract import open_encoder

LONGEST = 512
"""Maximum number of tokens of a text; weights take their square."""
CAPTION = "Rows are tokens, columns the tokens that they attend to. Each row sums to 1; darker is more."


def main(config: AttentionConfig) -> int:
    """Run `bestiary attention`; return the exit status."""
    check_output(config.out)
    page, progress = config.out.suffix == ".html", Progress()
    texts = config.texts or tuple(lines_of(None))
    if not texts:
        raise DataError("standard input: empty. Expected one text per line.")
    model, params, c, tokenizer = open_encoder(config.model, config.dtype)
    layers = chosen_places("layer", config.layers, c.layers, "model")
    layers = layers or list(range(c.layers if page else 1, c.layers + 1))
    heads = chosen_places("head", config.heads, c.heads, "model")
    longest = min(c.max_length or LONGEST, LONGEST)
    with jax.default_matmul_precision("highest" if config.dtype == "float32" else "default"):
        maps_of = jax.jit(partial(attention_maps, model))

    drawings, arrays, cut = [], {}, 0
    for number, text in enumerate(texts[:MOST] if page else texts):
        progress.update(f"{counted(number, 'text')} of {len(texts):,}")
        ids, types, truncated = tokenizer.encode([text], None, longest)
        cut += truncated
        tokens = [tokenizer.tokens[i] for i in ids[0]]
        batch = padded(ids[0], types[0], tokenizer.pad_id, longest)
        every_layer = np.asarray(maps_of(params, batch))[:, 0, :, : len(tokens), : len(tokens)]
        weights = every_layer[[layer - 1 for layer in layers]]
        if page:
            drawings.append(drawing(text, weights, layers, heads, tokens, tokens))
        else:
            chosen = weights[:, [head - 1 for head in heads]] if heads else weights
            arrays |= {f"weights.{number}": chosen, f"tokens.{number}": np.array(tokens)}
    if page:
        write_page(config.out, "Self-attention", CAPTION, drawings)
    else:
        with replacing(config.out) as unfinished, unfinished.open("wb") as file:
            np.savez(file, **arrays)
    note = f", {counted(cut, 'token')} truncated" if cut else ""
    left_out = f" The first {MOST} of {len(texts):,} are drawn; .npz takes all." if page and len(texts) > MOST else ""
    progress.line(f"attention of {counted(len(drawings) or len(arrays) // 2, 'text')}{note}: {config.out}.{left_out}")
    return 0


def padded(ids: Sequence[int], types: Sequence[int], pad_id: int, longest: int) -> dict[str, np.ndarray]:
    """Return a batch of one text, padded to one of a few lengths, so that few programs are compiled."""
    width = min(longest, 1 << max(4, (len(ids) - 1).bit_length()))
    batch = {"input_ids": np.full((1, width), pad_id, np.int32)}
    batch |= {name: np.zeros((1, width), np.int32) for name in ("segment_ids", "token_type_ids")}
    batch["input_ids"][0, : len(ids)] = ids
    batch["segment_ids"][0, : len(ids)] = 1
    batch["token_type_ids"][0, : len(ids)] = types
    return batch
