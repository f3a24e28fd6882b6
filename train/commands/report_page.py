"""A page (HTML) of runs, from what is in their folders. It contains all it shows, and every text in it is escaped."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data.json_files import read_object, read_object_lines
from ..errors import RunError
from ..run_folder import flatten, panels
from .charts import Series, draw_lines

STYLE = """
:root { color-scheme: light dark; --line: #d0d7de; --soft: #f6f8fa }
@media (prefers-color-scheme: dark) { :root { --line: #30363d; --soft: #161b22 } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
h1 { overflow-wrap: anywhere }
.wide { overflow-x: auto } table { border-collapse: collapse } caption { text-align: left }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
.curves { display: flex; flex-wrap: wrap; gap: 1rem } .curves img { max-width: 100% }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; white-space: pre-wrap }
"""

PLACES = ("out", "cache")
"""Settings that always differ, and say nothing."""
SPEEDS = ("_per_second", "seconds_in_steps", "seconds_compiling")
WHERE = ("devices", "versions.")


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says."""

    name: str
    settings: Mapping[str, Any]  # nested names are joined by points
    metrics: Sequence[Mapping[str, Any]]
    results: Mapping[str, Any]  # the same; empty: the run has not finished
    texts: Mapping[str, str]  # file -> content: samples, and tables of classes


def read_run(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        RunError: it is not a run folder.
        DataError: a file in it is damaged.
    """
    if not (folder / "config.json").is_file() or not (folder / "metrics.jsonl").is_file():
        missing = "config.json" if not (folder / "config.json").is_file() else "metrics.jsonl"
        raise RunError(f"{folder} is not the folder of a run (no {missing}). Give the --out of a command that trained.")
    results = folder / "results.json"
    texts = [folder / "samples.txt", *sorted(folder.glob("report/*.txt"))]
    return RunRecord(
        str(folder),
        flatten(read_object(folder / "config.json")),
        read_object_lines(folder / "metrics.jsonl"),
        flatten(read_object(results)) if results.is_file() else {},
        {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in texts if path.is_file()},
    )


def page(runs: Sequence[RunRecord]) -> str:
    """Return the page."""
    title = html.escape(", ".join(run.name for run in runs))
    unfinished = [run.name for run in runs if not run.results]
    figures = {key for run in runs for key in run.results}
    speeds = {key for key in figures if any(part in key for part in SPEEDS)}
    where = {key for key in figures if key.startswith(WHERE)}
    parts = [
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>\n<h1>{title}</h1>',
        *[f"<p>{html.escape(name)} has not finished: its curves end where it stands.</p>" for name in unfinished],
        _section("Results", _table(runs, "results", [k for k in _keys(runs, "results") if k not in speeds | where])),
        _section("Curves", _curves(runs)),
        _section("Settings that differ" if len(runs) > 1 else "Settings", _settings(runs)),
        _section("Speed", _table(runs, "results", [key for key in _keys(runs, "results") if key in speeds])),
        _section("Samples and reports", _texts(runs)),
        _section("Environment", _table(runs, "results", [key for key in _keys(runs, "results") if key in where])),
    ]
    return "\n".join(filter(None, parts)) + "\n"


def _section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>\n{content}" if content else ""


def _keys(runs: Sequence[RunRecord], part: str) -> list[str]:
    """Return the names in the results or settings of any run, in their order."""
    return list(dict.fromkeys(key for run in runs for key in getattr(run, part)))


def _table(runs: Sequence[RunRecord], part: str, keys: Sequence[str]) -> str:
    """Return a table with a row for each key and a column for each run."""
    if not keys:
        return ""
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    rows = [
        f"<tr><th>{html.escape(key)}</th>{''.join(_cell(getattr(run, part).get(key)) for run in runs)}</tr>"
        for key in keys
    ]
    return f'<div class="wide"><table><tr><th></th>{head}</tr>\n' + "\n".join(rows) + "\n</table></div>"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f'<td class="number">{value:,.6g}</td>'
    if isinstance(value, int) and not isinstance(value, bool):
        return f'<td class="number">{value:,}</td>'
    shown = "" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"<td>{html.escape(shown)}</td>"


def _settings(runs: Sequence[RunRecord]) -> str:
    keys = [key for key in _keys(runs, "settings") if key not in PLACES]
    differ = [key for key in keys if any(run.settings.get(key) != runs[0].settings.get(key) for run in runs)]
    if len(runs) == 1:
        return _table(runs, "settings", keys)
    if not differ:
        return "<p>None.</p>"
    same = _table(runs[:1], "settings", [key for key in keys if key not in differ])
    return f"{_table(runs, 'settings', differ)}\n<details><summary>The same in all</summary>{same}</details>"


def _curves(runs: Sequence[RunRecord]) -> str:
    """Return a chart for each metric: lines for the training, dots for held-out data."""
    pictures = []
    for name in panels([dict(record) for run in runs for record in run.metrics]):
        series = []
        for number, run in enumerate(runs):
            for key, label, dots in ((name, "training", False), (f"eval/{name}", "held out", True)):
                points = [(line["step"], line[key]) for line in run.metrics if line.get(key) is not None]
                if points:
                    series.append(Series(f"{run.name}, {label}" if len(runs) > 1 else label, points, number, dots))
        encoded = base64.b64encode(draw_lines(name, "step", series).encode()).decode()
        pictures.append(f'<img alt="{html.escape(name)} by step" src="data:image/svg+xml;base64,{encoded}">')
    return f'<div class="curves">{"".join(pictures)}</div>' if pictures else ""


def _texts(runs: Sequence[RunRecord]) -> str:
    return "\n".join(
        f"<h3>{html.escape(f'{run.name}: {name}')}</h3><pre>{html.escape(text)}</pre>"
        for run in runs
        for name, text in run.texts.items()
    )
