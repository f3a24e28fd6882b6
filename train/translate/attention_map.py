"""Draw attention maps, from the tokens of translations to those of their sources, as one self-contained HTML file."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...data.files import write_text
from ...models.incremental import cross_attention_maps
from ..errors import RunError
from .translator import Translation, Translator

MOST = 20  # maximum number of translations to draw

STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2em; color: #222; }
h2 { font-size: 16px; margin: 2em 0 .3em; } h3 { font-size: 13px; font-weight: 600; margin: .8em 0 .2em; }
section { display: flex; flex-wrap: wrap; gap: 1.5em; }
table { border-collapse: collapse; font-size: 12px; }
th { font-weight: 400; padding: 1px 4px; text-align: right; white-space: nowrap; }
thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; padding: 4px 1px; }
td { width: 20px; height: 20px; border: 1px solid #eee; }
"""


def to_draw(config: Any, layers: Sequence[int], heads: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the numbers of the layers and heads to draw, from 1: by default the last layer, and all heads.

    Raises:
        RunError: the model has no such layer or head.
    """
    if not config.decoder_heads:
        raise RunError("--attention: this model translates without attention; there is nothing to draw.")
    layers = check("layer", layers, config.decoder_layers) or [config.decoder_layers]
    return layers, check("head", heads, config.decoder_heads) or list(range(1, config.decoder_heads + 1))


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
    layers, chosen = to_draw(config, layers, heads)
    html_parts = []
    for source, target in (part for translation in translations[:MOST] for part in translation.parts):
        decoder_input = [config.decoder_start_token_id, *target]
        maps = jax.device_get(attention_of(model, translator.generator.prepared, source, decoder_input))
        columns = tokenizer.source.pieces(source)
        rows = tokenizer.target.pieces([*target, config.eos_token_id])
        title = f"{tokenizer.source.decode(source)} → {tokenizer.decode(target)}"
        html_parts.append(f"<h2>{html.escape(title)}</h2>")
        for layer in layers:
            pictures = [("mean of all heads", maps[layer - 1].mean(axis=0))] if not heads else []
            pictures += [(f"head {head}", maps[layer - 1, head - 1]) for head in chosen]
            html_parts.append("<section>")
            html_parts += [
                f"<div><h3>layer {layer}, {name}</h3>{table(picture, columns, rows)}</div>"
                for name, picture in pictures
            ]
            html_parts.append("</section>")
    title = "Cross-attention"
    head = f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"
    caption = (
        "<p>Rows are tokens of the translation, columns tokens of the source. Each row sums to 1; darker is more.</p>"
    )
    write_text(path, "\n".join([head, caption, *html_parts]) + "\n")


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


def check(what: str, asked: Sequence[int], count: int) -> list[int]:
    """Return the requested numbers; raise RunError if one is not from 1 to `count`."""
    for number in asked:
        if not 1 <= number <= count:
            raise RunError(f"--{what}s {number}: the decoder has {what}s 1 to {count}.")
    return list(asked)


def table(weights: np.ndarray, columns: Sequence[str], rows: Sequence[str]) -> str:
    """Return an HTML table with a coloured cell for each weight [rows, columns], whose tooltip is the number."""
    head = "".join(f"<th>{html.escape(piece)}</th>" for piece in columns)
    body = []
    for piece, row in zip(rows, weights, strict=True):
        cells = "".join(
            f'<td style="background:rgba(20,80,160,{weight:.3f})" title="{weight:.3f}"></td>' for weight in row.tolist()
        )
        body.append(f"<tr><th>{html.escape(piece)}</th>{cells}</tr>")
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
