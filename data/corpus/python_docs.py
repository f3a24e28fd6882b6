"""The corpus that every Python carries: the topics of its manual and its standard library's docstrings.

Nothing is imported for its docstrings, since importing may have side effects: the source files are parsed. The order is
that of the names, and the same Python gives the same documents. About 440 documents and 1.5 MB of prose on Python 3.12.
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
    """The files that `documentation` reads, in its order, each with its name below the standard library's folder."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [(file.relative_to(library), file) for file in library.rglob("*.py")]
    wanted = sorted((inside.parts, file) for inside, file in files if not _LEFT_OUT.intersection(inside.parts[:-1]))
    return sorted((("/".join(parts), file) for parts, file in wanted), key=lambda pair: pair[0] != _TOPICS)


def documentation(on_bytes: Callable[[int], None] = lambda count: None) -> Iterator[tuple[str, str]]:
    """(name, text) of each topic, then of each module that has docstrings, in reStructuredText."""
    for name, file in documentation_files():
        on_bytes(file.stat().st_size)
        yield from _read(name, file)


@cache
def _read(name: str, file: Path) -> list[tuple[str, str]]:
    """Kept (two megabytes in all): parsing takes seconds, and a first run reads three times."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # an old escape in a string is no concern of a reader
        tree = ast.parse(file.read_bytes(), str(file))
    if name == _TOPICS:
        return sorted((f"topics/{topic}", text) for topic, text in _topics(tree).items())
    docstrings = _docstrings(tree)
    return [(name, "\n\n".join(docstrings))] if docstrings else []


def _topics(tree: ast.Module) -> dict[str, str]:
    """The dictionary of literals that the module assigns to `topics`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return ast.literal_eval(node.value)
    return {}


def _docstrings(tree: ast.Module) -> list[str]:
    """Of the module, its classes and its functions, in the order of their lines."""
    return [text for node in [tree, *_definitions(tree.body)] if (text := ast.get_docstring(node))]


def _definitions(body: list[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Down through statements alone: expressions are most of a tree, and define nothing."""
    for statement in body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield statement
        for block in ("body", "handlers", "orelse", "finalbody", "cases"):
            yield from _definitions(getattr(statement, block, []))
