"""`bestiary report RUN... --out report.html`: one page of one run, or of several side by side."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class ReportConfig:
    """Write one self-contained page of runs: curves, settings that differ, results, speeds, samples, versions."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, of any commands that train."""
    out: Path = Path("report.html")
    """File to write."""


def main(config: ReportConfig) -> int:
    """Write the page; return the exit status."""
    from ...data.cloud.mirror import in_urls
    from ...data.files import write_text
    from .report_page import page, read_run

    if not config.runs:
        print("bestiary report: no run folders given", file=sys.stderr)
        return 2
    write_text(config.out, page([read_run(folder) for folder in config.runs]))
    print(f"{in_urls(str(config.out))}: {len(config.runs)} run{'s' if len(config.runs) > 1 else ''}")
    return 0
