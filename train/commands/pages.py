"""The zoo as pages, written from the code: a Markdown page and a diagram of each family, and a page that lists them."""

import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...data.files import write_text
from ...data.json_files import read_object
from ...data.tokenizers.kinds import TITLES
from ...models.family import Family
from ...models.registry import FAMILIES, families
from .diagram import draw, module_tree
from .listing import count_parameters
from .recipes import RECIPES

COMMAND = "bestiary models --pages docs/zoo --parity bench/parity.json"
MEASURES = ("outputs", "loss", "gradients", "training")
WIDTH = 108  # of a command, in characters
SHARED = {
    "gpt3": "GPT-2's layers, every second one within a band of tokens, at up to 175 billion parameters",
    "mt5": "T5 1.1 with a vocabulary of 250,000 pieces, pretrained on 101 languages",
    "xlm-roberta": "RoBERTa with a vocabulary of 250,000 pieces, pretrained on 100 languages",
}
"""What sets a family apart from the one whose file it shares."""
LARGE = 40_000_000
"""Parameters above which a family's smallest size is only tried here for a few steps."""


def write_pages(folder: Path, parity: Path | None) -> list[Path]:
    """Write the pages of all families; return their paths.

    Args:
        folder: where to write them, which is created.
        parity: what `bestiary parity --record` wrote; None: pages without errors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    measured = {} if parity is None else read_object(parity)
    pages = {"README.md": contents()}
    for family in families():
        pages[f"{family.name}.md"] = page(family, measured)
        pages[f"{family.name}.svg"] = picture(family)
    for name, text in pages.items():
        write_text(folder / name, text)
    return [folder / name for name in pages]


def contents() -> str:
    """Return the page that lists the families."""
    rows = []
    for family in families():
        sizes = [count_parameters(family, family.config.preset(name)) for name in family.config.PRESETS]
        span = " to ".join(dict.fromkeys(map(_short, (min(sizes), max(sizes))))) if sizes else "that of the checkpoint"
        rows.append(
            f"| [{family.title}]({family.name}.md) | {_what(family)} | {span} | {_objectives(family)} | "
            f"{family.paper} |"
        )
    return "\n".join(
        [
            "# The zoo\n",
            f"{len(rows)} families. A page has the sizes, heads, objectives, checkpoints and, where measured, errors "
            "of one.",
            f"The pages are written from the code:\n\n    {COMMAND}\n",
            "| family | what it is | parameters | pretraining | paper |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def page(family: Family, measured: Mapping[str, Any]) -> str:
    """Return a family's page.

    Args:
        family: the family.
        measured: what `bestiary parity --record` wrote; empty: nothing was measured.
    """
    code = f"models/{FAMILIES[family.name].partition(':')[0].removeprefix('.').replace('.', '/')}.py"
    reads = ", ".join(TITLES[kind] for kind in family.tokenizers) or family.reads
    return "\n".join(
        [
            f"# {family.title}\n",
            f"{family.paper}. Reads {reads}. `model_type` in config.json: "
            f"`{family.config.STORED_TYPE or family.name}`. Code: [{code}](../../{code}).\n",
            *([f"{family.title}: {SHARED[family.name]}.\n"] if family.name in SHARED else []),
            _docstring(family),
            f"\n![The modules of {family.title}, in the order of their calls]({family.name}.svg)\n",
            *_sizes(family),
            *_heads(family),
            *_pretraining(family),
            *_parity(family, measured),
        ]
    )


def picture(family: Family) -> str:
    """Return the diagram of a family: of its base size, with what it is pretrained with."""
    sizes = list(family.config.PRESETS)
    named = next((size for size in sizes if size.endswith("-base")), sizes[0] if sizes else None)
    config = family.config() if named is None else family.config.preset(named)
    heads = ("pretraining", "masked_lm", "causal_lm", "generation", "classification", *family.heads)
    return draw(module_tree(family, next(head for head in heads if head in family.heads), config))


def _sizes(family: Family) -> list[str]:
    if not family.config.PRESETS:
        return ["## Sizes\n", "That of the checkpoint; there are no named ones.\n"]
    rows = []
    for name in family.config.PRESETS:
        config: Any = family.config.preset(name)
        shown = " | ".join(_size(config, field) for field in ("layers", "width", "heads", "feed_forward"))
        rows.append(f"| `{name}` | {count_parameters(family, config):,} | {shown} |")
    head = ["| size | parameters | layers | width | heads | feed-forward |", "| --- | --- | --- | --- | --- | --- |"]
    more = f"\n`bestiary models show {next(iter(family.config.PRESETS))}` lists the parameters.\n"
    return ["## Sizes\n", *head, *rows, more]


def _size(config: Any, field: str) -> str:
    sides = [getattr(config, f"{side}_{field}", None) for side in ("encoder", "decoder")]
    found = [getattr(config, field, None)] if None in sides else sides
    return " + ".join(f"{size:,}" for size in found if size is not None)


def _heads(family: Family) -> list[str]:
    classes: dict[str, list[str]] = {}
    for architecture in family.architectures:
        classes.setdefault(architecture.head, []).append(f"`{architecture.name}`")
    rows = [f"| `{head}` | {', '.join(dict.fromkeys(names))} |" for head, names in classes.items()]
    return [
        "## Heads and checkpoints\n",
        "Checkpoint folders of these classes are read, and written with the same names and bytes:\n",
        "| head | `architectures` in config.json |\n| --- | --- |",
        *rows,
        "",
    ]


def _pretraining(family: Family) -> list[str]:
    lines = []
    recipe = RECIPES.get(family.name)
    if recipe is not None:
        lines += [f"As in the paper:\n\n{_wrapped(recipe.command)}\n", *([recipe.note + "\n"] if recipe.note else [])]
    small = small_command(family) or (recipe.small if recipe is not None else "")
    if small:
        lines.append(f"A small one, here and now:\n\n{_wrapped(small)}\n")
    if not lines:
        return []
    objectives = f"Objectives: {_objectives(family)}.\n" if family.objectives else ""
    return ["## Training\n", *filter(None, [objectives]), *lines]


def small_command(family: Family) -> str | None:
    """Return the command that pretrains the smallest size of a family for a little; None: it has no objective."""
    if not family.objectives:
        return None
    counts = {name: count_parameters(family, family.config.preset(name)) for name in family.config.PRESETS}
    name = min(counts, key=lambda name: counts[name])
    length = "--batch-tokens 512 --steps 10" if counts[name] > LARGE else "--steps 300"
    return f"bestiary pretrain --model {name} {length} --out runs/{name}"


def _parity(family: Family, measured: Mapping[str, Any]) -> list[str]:
    if family.name not in measured:
        return []
    own = measured[family.name]
    cells = " | ".join("" if own[name] is None else f"{own[name]:.1e}" for name in MEASURES)
    fixtures = ", ".join(f"`{name}`" for name in own["fixtures"])
    return [
        "## Parity\n",
        f"Largest errors against the reference implementation, {own['date']}, {own['machine']}: absolute for outputs "
        "and loss, relative for gradients and for the losses of 20 training steps ([how](../../bench/parity.md)).\n",
        f"| {' | '.join(MEASURES)} | saved again |",
        "| --- | --- | --- | --- | --- |",
        f"| {cells} | {'the same bytes' if own['same_bytes'] else 'differs'} |",
        f"\nCheckpoints: {fixtures}.\n",
    ]


def _objectives(family: Family) -> str:
    return ", ".join(f"`{objective}`" for objective in family.objectives)


def _what(family: Family) -> str:
    """Return the first sentence about a family, without its name."""
    if family.name in SHARED:
        return SHARED[family.name]
    first = _docstring(family).partition("\n")[0].rstrip(".").partition(";")[0]
    name, _, rest = first.partition(": ")
    return rest if rest and len(name) < 20 else first


def _docstring(family: Family) -> str:
    """Return what a family's file says about it."""
    module = f"bestiary.models{FAMILIES[family.name].partition(':')[0]}"
    return inspect.cleandoc(sys.modules[module].__doc__ or "")


def _wrapped(command: str) -> str:
    """Return a command as an indented block, broken before flags."""
    lines = [""]
    for part in re.split(r" (?=--)", command):
        if lines[-1] and len(lines[-1]) + len(part) > WIDTH:
            lines.append(f"    {part}")
        else:
            lines[-1] = f"{lines[-1]} {part}".lstrip(" ") if len(lines) == 1 else f"{lines[-1]} {part}"
    return " \\\n".join(f"    {line}" for line in lines)


def _short(count: int) -> str:
    """Format a number of parameters: `110 M`, `175 B`, unbroken."""
    return f"{count / 1e9:,.1f}\N{NO-BREAK SPACE}B" if count >= 1e9 else f"{count / 1e6:,.0f}\N{NO-BREAK SPACE}M"
