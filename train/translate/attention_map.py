"""Draw the attention of the tokens of translations to those of their sources."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...models.incremental import cross_attention_maps
from ..attention_page import MOST, chosen_places, drawing, write_page
from ..errors import RunError
from .translator import Translation, Translator


def to_draw(config: Any, layers: Sequence[int], heads: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the numbers of the layers and heads to draw, from 1: by default the last layer, and no heads for all.

    Raises:
        RunError: the model has no such layer or head.
    """
    if not config.decoder_heads:
        raise RunError("--attention: this model translates without attention; there is nothing to draw.")
    layers = chosen_places("layer", layers, config.decoder_layers, "decoder") or [config.decoder_layers]
    return layers, chosen_places("head", heads, config.decoder_heads, "decoder")


def draw_attention(
    path: Path,
    translator: Translator,
    translations: Sequence[Translation],
    layers: Sequence[int],
    heads: Sequence[int],
) -> None:
    """Draw the decoder's attention to the sources of translations; a line that was translated in parts has several.

    Args:
        path: HTML file to write.
        translator: the translator that made the translations.
        translations: translations, of which the first `MOST` are drawn.
        layers: numbers of layers, from 1; empty for the last one.
        heads: numbers of heads, from 1; empty for all heads and their mean.

    Raises:
        RunError: the model has no such layer or head.
    """
    model, tokenizer = translator.model, translator.tokenizer
    config = model.config
    layers, heads = to_draw(config, layers, heads)
    drawings = []
    for source, target in (part for translation in translations[:MOST] for part in translation.parts):
        decoder_input = [config.decoder_start_token_id, *target]
        maps = jax.device_get(attention_of(model, translator.generator.prepared, source, decoder_input))
        columns = tokenizer.source.pieces(source)
        rows = tokenizer.target.pieces([*target, config.eos_token_id])
        title = f"{tokenizer.source.decode(source)} → {tokenizer.decode(target)}"
        drawings.append(drawing(title, maps[[layer - 1 for layer in layers]], layers, heads, columns, rows))
    write_page(
        path,
        "Cross-attention",
        "Rows are tokens of the translation, columns tokens of the source. Each row sums to 1; darker is more.",
        drawings,
    )


def attention_of(model: Any, prepared: Any, source: Sequence[int], target: Sequence[int]) -> Any:
    """Compute the decoder's attention to one source.

    Lengths are padded to a power of two internally, so that few programs are compiled.

    Args:
        model: the model.
        prepared: its parameters, prepared by its steps.
        source: S token ids, with the end token.
        target: T token ids, including the start token.

    Returns:
        [N, H, T, S] float32, for each layer and head.
    """
    rows = [np.asarray(ids, np.int32) for ids in (source, target)]
    widths = [1 << max(4, (len(ids) - 1).bit_length()) for ids in rows]
    padded = [jnp.asarray(np.pad(ids, (0, width - len(ids)))[None]) for ids, width in zip(rows, widths, strict=True)]
    segments = jnp.asarray(np.arange(widths[0]) < len(source), jnp.int32)[None]
    maps = cross_attention_maps(model, prepared, padded[0], padded[1], segments)
    return maps[:, 0, :, : len(target), : len(source)]
