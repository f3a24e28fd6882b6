"""Charts as SVG, in greys and colours that are readable on a light and on a dark page."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

COLOURS = ("#3b82f6", "#f97316", "#22a55b", "#e5484d", "#a855f7", "#0ea5b7", "#b7791f", "#ec4899")
GREY = "#7d8590"
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "bestiary",  # the same chart is the same file
    "font.family": "sans-serif",
    "font.size": 9,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
}


class Series(NamedTuple):
    """One line of a chart, or dots."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int  # number of the colour
    dots: bool = False


def draw_lines(title: str, across: str, series: Sequence[Series]) -> str:
    """Return a chart of lines and dots as SVG.

    Args:
        title: what the height is.
        across: what the abscissa is.
        series: the lines; a label that has been used is not repeated.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axes = figure.subplots()
        for line in series:
            colour, style = COLOURS[line.colour % len(COLOURS)], "o" if line.dots else "-"
            axes.plot(*zip(*line.points, strict=True), style, color=colour, label=_plain(line.label), lw=1.4, ms=5)
        axes.set_title(_plain(title))
        axes.set_xlabel(across)
        axes.grid(alpha=0.2)
        axes.legend()
        return _svg(figure)


def draw_bars(title: str, unit: str, bars: Mapping[str, Mapping[str, float]]) -> str:
    """Return a chart of groups of horizontal bars as SVG.

    Args:
        title: what is compared.
        unit: of the numbers.
        bars: group -> name -> length.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for group in bars.values() for name in group))
    with rc_context(STYLE):
        figure = Figure(
            figsize=(7.2, 0.8 + 0.24 * sum(len(group) + 1 for group in bars.values())), layout="constrained"
        )
        axes = figure.subplots()
        height = 0.8 / max(1, len(names))
        for number, name in enumerate(names):
            places = [(at, group[name]) for at, group in enumerate(bars.values()) if name in group]
            drawn = axes.barh(
                [at + (number - (len(names) - 1) / 2) * height for at, _ in places],
                [value for _, value in places], height * 0.9, color=COLOURS[number % len(COLOURS)], label=_plain(name),
            )  # fmt: skip
            axes.bar_label(drawn, fmt="{:.3g}", padding=3, color=GREY, fontsize=8)
        axes.set_yticks(range(len(bars)), [_plain(group) for group in bars])
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.set_title(_plain(title))
        figure.legend(loc="outside lower center", ncols=2)
        return _svg(figure)


def _plain(text: str) -> str:
    """Return a text in which matplotlib reads no formula."""
    return text.replace("$", r"\$")


def _svg(figure: Any) -> str:
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None}, transparent=True)
    text = written.getvalue()
    return text[text.index("<svg") :]  # without the XML declaration, which has no place inside a page
