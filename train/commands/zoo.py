"""List the models: `bestiary models`, and `bestiary models show NAME` for the parameters of one; write their pages."""

import json as json_text
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ...data.tokenizers.kinds import TITLES


@dataclass(frozen=True)
class ModelsConfig:
    """List the model families, with their sizes, heads and objectives."""

    json: bool = False
    """Print one JSON array instead of text."""
    pages: Path | None = None
    """Folder to write a page and a diagram of each family to, instead of printing."""
    parity: Path | None = None
    """What `bestiary parity --record` wrote, for the errors on the pages."""


@dataclass(frozen=True)
class ShowConfig:
    """Show the parameters of one size: names, shapes, logical axes, bytes."""

    name: Annotated[str, tyro.conf.Positional]
    """A size in the list of `bestiary models`: bert-base, roberta-base, ..."""
    head: str | None = None
    """Head of the model: encoder, masked_lm, classification, ... None: the family's first."""
    json: bool = False
    """Print one JSON object instead of text."""


def main(config: ModelsConfig | ShowConfig) -> int:
    """Run either command; return the exit status."""
    from ...models.registry import families
    from .listing import describe_family, describe_model

    if isinstance(config, ShowConfig):
        shown = describe_model(config.name, config.head)
        print(json_text.dumps(shown, indent=2) if config.json else "\n".join(_tree(shown)))
        return 0
    if config.pages is not None:
        from .pages import write_pages

        print(f"{len(write_pages(config.pages, config.parity))} files in {config.pages}")
        return 0
    found = [describe_family(family) for family in families()]
    print(json_text.dumps(found, indent=2) if config.json else "\n\n".join(map(_block, found)))
    return 0


def _block(family: dict[str, Any]) -> str:
    reads = ", ".join(TITLES[kind] for kind in family["tokenizers"]) or family["reads"]
    lines = [f"{family['title']} ({family['family']}): {family['paper']}; {reads}"]
    lines.append(f"  heads       {', '.join(family['heads'])}")
    if family["objectives"]:
        lines.append(f"  objectives  {', '.join(family['objectives'])}")
    width = max(map(len, family["sizes"]), default=0)
    lines += [f"  {name:<{width}}  {count:>13,} parameters" for name, count in family["sizes"].items()]
    return "\n".join(lines)


def _tree(shown: dict[str, Any]) -> list[str]:
    width = max(len(parameter["name"]) for parameter in shown["tree"])
    lines = [
        f"{parameter['name']:<{width}}  {parameter['bytes']:>14,} bytes  "
        f"{' x '.join(f'{axis} {size}' for axis, size in zip(parameter['axes'], parameter['shape'], strict=True))}"
        for parameter in shown["tree"]
    ]
    total = (
        f"{shown['size']} ({shown['head']}): {shown['parameters']:,} parameters, {shown['bytes']:,} bytes in float32"
    )
    return [*lines, total]
