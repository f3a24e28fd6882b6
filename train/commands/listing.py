"""Descriptions of the families as plain data: sizes, heads, and the parameters of one size.

Nothing is computed: shapes come from tracing the models.
"""

import math
from typing import Any

import jax
from flax import linen as nn

from ...models.family import Family, FamilyConfig
from ...models.registry import init_params, presets
from ..arguments import did_you_mean

BYTES = 4  # of a parameter, which is always float32


class UnknownModelError(ValueError):
    """Raised for a size or a head that does not exist."""


def describe_family(family: Family) -> dict[str, Any]:
    """Describe one family: its sizes, heads and objectives."""
    sizes = {name: count_parameters(family, family.config.preset(name)) for name in family.config.PRESETS}
    return {
        "family": family.name,
        "title": family.title,
        "paper": family.paper,
        "reads": family.reads,
        "tokenizers": list(family.tokenizers),
        "heads": list(family.heads),
        "objectives": list(family.objectives),
        "sizes": sizes,
    }


def describe_model(name: str, head: str | None = None) -> dict[str, Any]:
    """Describe the parameters of one size with one head.

    Raises:
        UnknownModelError: there is no such size, or its family has no such head.
    """
    known = presets()
    if name not in known:
        meant = did_you_mean(name, known) or f" Expected one of {', '.join(known)}."
        raise UnknownModelError(f"{name!r} is not a size of this version.{meant}")
    family = known[name]
    head = family.heads[0] if head is None else head
    if head not in family.heads:
        raise UnknownModelError(f"{family.title} has no head {head!r}; known: {', '.join(family.heads)}.")
    leaves = jax.tree_util.tree_leaves_with_path(
        _shapes(family, head, family.config.preset(name)), is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)
    )
    parameters = [
        {
            "name": "/".join(str(part.key) for part in path),
            "shape": list(leaf.value.shape),
            "axes": list(leaf.names),
            "bytes": BYTES * math.prod(leaf.value.shape),
        }
        for path, leaf in leaves
    ]
    total = sum(parameter["bytes"] for parameter in parameters)
    return {"size": name, "family": family.name, "head": head, "parameters": total // BYTES, "bytes": total,
            "tree": parameters}  # fmt: skip


def _shapes(family: Family, head: str, config: FamilyConfig) -> Any:
    model = family.build(head, config)
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def count_parameters(family: Family, config: FamilyConfig) -> int:
    """Count the parameters of the family's first model, without those that a layer of a stack lacks."""
    entries = family.architectures[0].table(config).entries
    return sum(math.prod(entry.transform.shape) * len(entry.rows) for entry in entries)
