"""Draw attention weights between tokens as one self-contained HTML file."""

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data.files import write_text
from .errors import RunError

MOST = 20  # maximum number of texts or translations to draw

STYLE = """
:root { color-scheme: light dark; --line: #eee; --ink: 20, 80, 160 }
@media (prefers-color-scheme: dark) { :root { --line: #30363d; --ink: 88, 166, 255 } }
body { font: 14px system-ui, sans-serif; margin: 2em auto; max-width: 80rem; padding: 0 1em; }
div { max-width: 100%; overflow-x: auto; }
h2 { font-size: 16px; margin: 2em 0 .3em; } h3 { font-size: 13px; font-weight: 600; margin: .8em 0 .2em; }
section { display: flex; flex-wrap: wrap; gap: 1.5em; }
table { border-collapse: collapse; font-size: 12px; }
th { font-weight: 400; padding: 1px 4px; text-align: right; white-space: nowrap; }
thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; padding: 4px 1px; }
td { width: 20px; height: 20px; border: 1px solid var(--line); }
"""


def chosen_places(what: str, asked: Sequence[int], count: int, owner: str) -> list[int]:
    """Return the requested numbers of layers or heads; raise RunError if one is not from 1 to `count`."""
    for number in asked:
        if not 1 <= number <= count:
            raise RunError(f"--{what}s {number}: the {owner} has {what}s 1 to {count}.")
    return list(asked)


def drawing(
    title: str,
    maps: np.ndarray,
    layers: Sequence[int],
    heads: Sequence[int],
    columns: Sequence[str],
    rows: Sequence[str],
) -> str:
    """Draw the weights of one text.

    Args:
        title: its heading.
        maps: [N, H, rows, columns] float32, of the chosen layers and of all heads.
        layers: numbers of the N layers, from 1.
        heads: numbers of heads to draw, from 1; empty for all heads and their mean.
        columns: tokens that are attended to.
        rows: tokens that attend.

    Returns:
        HTML.
    """
    parts = [f"<h2>{html.escape(title)}</h2>"]
    for layer, weights in zip(layers, maps, strict=True):
        pictures = [] if heads else [("mean of all heads", weights.mean(axis=0))]
        pictures += [(f"head {head}", weights[head - 1]) for head in heads or range(1, len(weights) + 1)]
        parts.append("<section>")
        parts += [
            f"<div><h3>layer {layer}, {name}</h3>{_table(picture, columns, rows)}</div>" for name, picture in pictures
        ]
        parts.append("</section>")
    return "\n".join(parts)


def write_page(path: Path, title: str, caption: str, drawings: Sequence[str]) -> None:
    """Write a page of drawings."""
    head = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"
    )
    write_text(path, "\n".join([head, f"<p>{caption}</p>", *drawings]) + "\n")


def _table(weights: np.ndarray, columns: Sequence[str], rows: Sequence[str]) -> str:
    """Return an HTML table with a coloured cell for each weight [rows, columns], whose tooltip is the number."""
    head = "".join(f"<th>{html.escape(piece)}</th>" for piece in columns)
    body = []
    for piece, row in zip(rows, weights, strict=True):
        cells = "".join(
            f'<td style="background:rgba(var(--ink),{weight:.3f})" title="{weight:.3f}"></td>'
            for weight in row.tolist()
        )
        body.append(f"<tr><th>{html.escape(piece)}</th>{cells}</tr>")
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
