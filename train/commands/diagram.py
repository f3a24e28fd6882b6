"""Draw a model as nested boxes (SVG): its modules in the order of their calls, with the shapes of their parameters.

The tree is recorded while the model is traced, so that the picture shows what runs. It has colours of its own for a
light and a dark page.
"""

import html
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import linen as nn

from ...models.family import Family, FamilyConfig

WIDTH, PAD, LINE, GAP = 760, 12, 18, 8
MOST_IN_A_ROW = 4

STYLE = """
text { font: 13px ui-sans-serif, system-ui, sans-serif; fill: #1f2328 }
.what { fill: #57606a; font-size: 12px } .page { fill: #ffffff } .leaf { fill: #ddf4ff; stroke: #54aeff }
.box { fill: #f6f8fa; stroke: #afb8c1 } .layers { fill: #fff8c5; stroke: #d4a72c }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .what { fill: #9da7b3 } .page { fill: #0d1117 } .leaf { fill: #0c2d4a; stroke: #388bfd }
  .box { fill: #161b22; stroke: #6e7681 } .layers { fill: #2e2a1f; stroke: #bb8009 }
}
"""


@dataclass
class Node:
    """A module: its name, its class, the shapes of its own parameters, and the modules in it."""

    name: str
    kind: str = ""
    shapes: list[tuple[int, ...]] = field(default_factory=list)  # without the axis of stacked layers
    repeated: int = 0  # number of layers that are stacked in it; 0: not stacked
    parts: dict[str, "Node"] = field(default_factory=dict)


def module_tree(family: Family, head: str, config: FamilyConfig) -> Node:
    """Trace a model, and return its modules with parameters, in the order of their calls. Nothing is computed."""
    model = family.build(head, config)
    root = Node(family.title, type(model).__name__)

    def record(call: Any, arguments: Any, named: Any, context: nn.module.InterceptorContext) -> Any:
        node = root
        if context.method_name != "setup":
            for name in context.module.path:
                node = node.parts.setdefault(name, Node(name))
            if context.module.path:
                node.kind = type(context.module).__name__
        return call(*arguments, **named)

    with nn.intercept_methods(record):
        inputs = family.inputs(config)
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs)["params"])
    boxed = jax.tree_util.tree_leaves_with_path(shapes, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    for path, leaf in boxed:
        node, stacked = root, leaf.names[:1] == ("layers",)
        for part in path[:-1]:
            node = node.parts.setdefault(part.key, Node(part.key))
        node.repeated = leaf.value.shape[0] if stacked else 0
        node.shapes.append(leaf.value.shape[1:] if stacked else leaf.value.shape)
    _prune(root)
    _gather_repeats(root)
    return root


def _prune(node: Node) -> bool:
    """Remove modules without parameters; tell whether any are left."""
    node.parts = {name: part for name, part in node.parts.items() if _prune(part)}
    return bool(node.parts or node.shapes)


def _gather_repeats(node: Node) -> int:
    """Move the number of layers up to the module all of whose parts are stacked."""
    counts = {_gather_repeats(part) for part in node.parts.values()} | ({node.repeated} if node.shapes else set())
    if len(counts) != 1 or not node.parts:
        return node.repeated
    (node.repeated,) = counts
    for part in node.parts.values():
        part.repeated = 0
    return node.repeated


def draw(root: Node) -> str:
    """Return the SVG of a tree of modules."""
    body, height = _draw(root, GAP, GAP, WIDTH - 2 * GAP)
    size = f'width="{WIDTH}" height="{height + 2 * GAP}" viewBox="0 0 {WIDTH} {height + 2 * GAP}"'
    label = html.escape(f"The modules of {root.kind}, in the order of their calls")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{label}">\n<style>{STYLE}</style>\n'
        f'<rect class="page" width="100%" height="100%" rx="8"/>\n{body}</svg>\n'
    )


def _draw(node: Node, x: int, y: int, width: int) -> tuple[str, int]:
    """Draw a module with its top left corner at x, y; return the SVG and its height."""
    times = f" × {node.repeated}" if node.repeated else ""
    if not node.parts:
        shapes = ["×".join(map(str, shape)) for shape in sorted(dict.fromkeys(node.shapes), key=len, reverse=True)]
        told = [
            f"{node.kind} {', '.join(shapes[:most])}".strip() for most in (len(shapes), 1)
        ]  # the kernel, if not all
        fits = next((text for text in told if len(text) <= _most(width)), told[-1])
        return _box("leaf", x, y, width, 2 * LINE + PAD, node.name + times, fits), 2 * LINE + PAD
    inside, down = "", y + LINE + PAD
    parts = list(node.parts.values())
    while parts:
        together = 1
        while together < min(len(parts), MOST_IN_A_ROW) and not any(part.parts for part in parts[: together + 1]):
            together += 1
        row, parts = parts[:together], parts[together:]
        each = (width - 2 * PAD - GAP * (together - 1)) // together
        drawn = [_draw(part, x + PAD + at * (each + GAP), down, each) for at, part in enumerate(row)]
        inside += "".join(svg for svg, _ in drawn)
        down += max(height for _, height in drawn) + GAP
    height = down - GAP + PAD - y
    style = "layers" if node.repeated else "box"
    return _box(style, x, y, width, height, node.name + times, node.kind) + inside, height


def _box(style: str, x: int, y: int, width: int, height: int, name: str, what: str) -> str:
    """Return a box with its name and, beside it in a container or below it in a leaf, what it is."""
    what = f'class="what">{html.escape(_cut(what, width))}'
    below = f'</text><text x="{x + PAD}" y="{y + 2 * LINE}" {what}</text>'
    beside = f'<tspan dx="{GAP}" {what}</tspan></text>'
    return (
        f'<rect class="{style}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>'
        f'<text x="{x + PAD}" y="{y + LINE}">{html.escape(_cut(name, width))}{below if style == "leaf" else beside}\n'
    )


def _cut(text: str, width: int) -> str:
    return text if len(text) <= _most(width) else text[: _most(width) - 1] + "…"


def _most(width: int) -> int:
    """Return the number of characters that fit into a box."""
    return 2 * (width - 2 * PAD) // 13
