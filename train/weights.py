"""A tree of parameters in a file of its own, beside the checkpoints: the best so far, or one of an average."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from ..models.checkpoints.tables import flatten


def write_params(path: Path, params: Any) -> None:
    """Keep a tree of parameters, atomically."""
    partial = path.with_name(f"{path.name}.partial")
    save_file({"/".join(names): np.ascontiguousarray(leaf) for names, leaf in flatten(params)}, partial)
    partial.replace(path)


def read_params(path: Path) -> Any:
    """The tree that `write_params` kept."""
    tree: dict[str, Any] = {}
    for name, leaf in load_file(path).items():
        *above, last = name.split("/")
        branch = tree
        for part in above:
            branch = branch.setdefault(part, {})
        branch[last] = leaf
    return tree
