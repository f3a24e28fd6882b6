"""Draw or store the attention weights of a pretrained encoder.

bestiary attention --model FOLDER --out page.html "The nurse said that she would help him."
bestiary attention --model FOLDER --layers 11 --heads 6 --out weights.npz < texts.txt
"""

import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ...data.errors import DataError
from ...data.files import check_output, replacing
from ...data.progress import counted
from ...data.reading import lines_of
from ...models.attention_maps import attention_maps
from ...models.encoder import StackEncoder
from ..attention_page import MOST, chosen_places, drawing, write_page
from ..errors import RunError
from ..progress import Progress
from .config import AttentionConfig
from .extract import open_encoder, sentence_folder

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
    model, params, c, tokenizer = open_encoder(sentence_folder(config.model), config.dtype)
    if not isinstance(model, StackEncoder):
        raise RunError(f"--model {config.model}: attention of the form of {type(model).__name__}'s cannot be drawn.")
    layers = chosen_places("layer", config.layers, c.layers, "model")
    layers = layers or list(range(c.layers if page else 1, c.layers + 1))
    heads = chosen_places("head", config.heads, c.heads, "model")
    longest = min(c.max_length or LONGEST, LONGEST)
    done, cut = 0, 0

    @jax.jit
    def maps_of(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        with jax.default_matmul_precision("highest" if config.dtype == "float32" else "default"):
            return attention_maps(model, params, batch, layers=[layer - 1 for layer in layers])[:, 0]

    def weighed() -> Iterator[tuple[str, list[str], np.ndarray]]:
        """Yield each text, its tokens and its weights [layers, H, tokens, tokens]."""
        nonlocal done, cut
        for text in texts[:MOST] if page else texts:
            progress.update(f"{counted(done, 'text')} of {len(texts):,}")
            ids, types, truncated = tokenizer.encode([text], None, longest)
            batch = padded(ids[0], types[0], tokenizer.pad_id, longest)
            tokens = [tokenizer.tokens[i] for i in ids[0]]
            yield text, tokens, np.asarray(maps_of(params, batch))[:, :, : len(tokens), : len(tokens)]
            done, cut = done + 1, cut + truncated

    if page:
        drawings = [drawing(text, maps, layers, heads, tokens, tokens) for text, tokens, maps in weighed()]
        write_page(config.out, "Self-attention", CAPTION, drawings)
    else:
        with replacing(config.out) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
            for number, (_, tokens, maps) in enumerate(weighed()):
                chosen = maps[:, [head - 1 for head in heads]] if heads else maps
                for name, array in ((f"weights.{number}", chosen), (f"tokens.{number}", np.array(tokens))):
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
    note = f", {counted(cut, 'token')} beyond {longest:,} a text left out" if cut else ""
    left_out = f" The first {MOST} of {len(texts):,} are drawn; .npz takes all." if page and len(texts) > MOST else ""
    progress.line(f"attention of {counted(done, 'text')}{note}: {config.out}.{left_out}")
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
