"""The corpus built into every Python: the topics of its manual and the docstrings of its standard library.

The source files are parsed, not imported, since importing may have side effects. Documents are in the order of their
names; the same Python gives the same documents: about 440, with 1.5 MB of prose, on Python 3.12.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

# Tests, programs and generated tables: little prose, or none.
_LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "encodings",
    "site-packages",
    "dist-packages",
    "__pycache__",
}
_TOPICS = "pydoc_data/topics.py"


def documentation_files() -> list[tuple[str, Path]]:
    """Return the files that `documentation` reads, in order, each with its path relative to the standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [(file.relative_to(library), file) for file in library.rglob("*.py")]
    wanted = sorted((inside.parts, file) for inside, file in files if not _LEFT_OUT.intersection(inside.parts[:-1]))
    return sorted((("/".join(parts), file) for parts, file in wanted), key=lambda pair: pair[0] != _TOPICS)


def documentation(on_bytes: Callable[[int], None] = lambda count: None) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each topic, then of each module with docstrings, in reStructuredText."""
    for name, file in documentation_files():
        on_bytes(file.stat().st_size)
        yield from _read(name, file)


@cache
def _read(name: str, file: Path) -> list[tuple[str, str]]:
    """Parse a file. Cached (2 MB in all): parsing takes seconds, and a first run reads everything three times."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # outdated escapes in strings do not matter here
        tree = ast.parse(file.read_bytes(), str(file))
    if name == _TOPICS:
        return sorted((f"topics/{topic}", text) for topic, text in _topics(tree).items())
    docstrings = _docstrings(tree)
    return [(name, "\n\n".join(docstrings))] if docstrings else []


def _topics(tree: ast.Module) -> dict[str, str]:
    """Return the dictionary of literals that the module assigns to `topics`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return ast.literal_eval(node.value)
    return {}


def _docstrings(tree: ast.Module) -> list[str]:
    """Return the docstrings of the module, its classes and its functions, in source order."""
    return [text for node in [tree, *_definitions(tree.body)] if (text := ast.get_docstring(node))]


def _definitions(body: list[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Walk definitions through statements only: expressions are most of a tree, and define nothing."""
    for statement in body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield statement
        for block in ("body", "handlers", "orelse", "finalbody", "cases"):
            yield from _definitions(getattr(statement, block, []))
