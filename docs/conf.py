"""The site: Sphinx reads the Markdown pages of the repository as they are.

    uv run --group docs sphinx-build -W -c docs . build/docs

The pages are plain Markdown, so that a code host shows them too. A page named README.md is the contents of its folder:
the navigation has the pages that it links to, in that order.
"""

import re
from importlib.metadata import version as installed
from posixpath import dirname, join, normpath
from typing import Any

project = "bestiary"
release = version = installed("bestiary")
author = project_copyright = "the authors of bestiary"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "docs/README"
exclude_patterns = ["docs/examples"]
include_patterns = ["README.md", "CONTRIBUTING.md", "models/README.md", "bench/*.md", "docs/*.md", "docs/*/*.md"]
source_suffix = {".md": "markdown"}

myst_heading_anchors = 3
myst_fence_as_directive = []

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {"ArrayLike": "ArrayLike"}
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True, "undoc-members": False, "show-inheritance": True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True

smartquotes_action = "qe"  # -- is the beginning of a flag

html_theme = "furo"
html_title = "bestiary"
html_static_path = ["site"]
html_css_files = ["site.css"]
html_extra_path = ["redirect"]
html_theme_options = {"navigation_with_keys": True}

LINK = re.compile(r"\]\(([^)#:]+\.md)\)")


def add_navigation(app: Any, docname: str, source: list[str]) -> None:
    """Give the contents of a folder a hidden table of contents: the pages that its README.md links to."""
    del app
    if docname in ("README", "models/README") or not docname.endswith("README"):
        return
    pages = dict.fromkeys(normpath(join(dirname(docname), link)) for link in LINK.findall(source[0]))
    # The title of the README is the name of the site, which stands above it already.
    entries = [f"/{page.removesuffix('.md')}" for page in pages if page != "docs/README.md"]
    lines = "\n".join("Start </README>" if entry == "/README" else entry for entry in entries)
    source[0] += f"\n```{{toctree}}\n:hidden:\n\n{lines}\n```\n"


def readable(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Turn a docstring, plain text with `code` in backticks and indented blocks of code, into reStructuredText."""
    del app, what, name, thing, options
    kind = next((line for line in lines if line.startswith(":type: ")), None)
    if kind is not None:  # napoleon takes what stands before a colon for a type
        lines.remove(kind)
        lines[0] = f"{kind.removeprefix(':type: ')}: {lines[0]}"
    made: list[str] = []
    code = False
    for line in lines:
        indented = line.startswith("    ")
        if indented and made and not made[-1].strip() and not code:
            above = next((one for one in reversed(made) if one.strip()), ":")
            code = not above.startswith((" ", ":", ".."))
            made += ["::", ""] if code else []
        code = code and (indented or not line.strip())
        made.append(line if code else _escaped(line))
    lines[:] = made


def _escaped(line: str) -> str:
    parts = line.split("`")  # every second one is code
    parts[::2] = [re.sub(r"(?<!\\)([*|])", r"\\\1", re.sub(r"(\w)_(?!\w)", r"\1\\_", part)) for part in parts[::2]]
    return "``".join(parts) if len(parts) % 2 and "``" not in line else "`".join(parts)


def setup(app: Any) -> None:
    """Connect the two."""
    app.connect("source-read", add_navigation)
    app.connect("autodoc-process-docstring", readable, priority=900)  # after napoleon
