"""Adapters that peft saved: what one changes in a model, and the model with it merged.

bestiary adapter load bert-base-uncased my-adapter
bestiary adapter merge bert-base-uncased my-adapter --out merged
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class LoadConfig:
    """Check that an adapter fits a model, and print what it changes, as JSON."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """Checkpoint folder of the model that the adapter was trained on."""
    adapter: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ADAPTER")]
    """Folder with adapter_config.json and adapter_model.safetensors, as peft writes them."""


@dataclass(frozen=True)
class MergeConfig:
    """Merge an adapter into a model: write the checkpoint that computes the same without the adapter."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """Checkpoint folder of the model that the adapter was trained on."""
    adapter: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ADAPTER")]
    """Folder with adapter_config.json and adapter_model.safetensors, as peft writes them."""
    out: Path
    """Checkpoint folder to write, with the model's tokenizer."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Data type to store."""


def main(config: LoadConfig | MergeConfig) -> int:
    """Run `bestiary adapter load` or `bestiary adapter merge`; return the exit status."""
    # Imported here, since they import JAX, which would delay --help.
    from ...data.cloud.mirror import in_urls
    from ...data.files import check_output_folder
    from ...data.json_files import json_text
    from ...models import save
    from ...models.checkpoints.folder import TOKENIZER_FILES
    from ...models.checkpoints.peft import load_adapted
    from ...models.checkpoints.tables import flatten
    from ...models.lora import LORA_A, is_lora, merge_lora

    if isinstance(config, MergeConfig):
        check_output_folder(config.out, new=True)
    loaded, params, settings = load_adapted(config.model, config.adapter)
    if isinstance(config, MergeConfig):
        has_tokenizer = any((config.model / name).is_file() for name in TOKENIZER_FILES)
        merged, _ = merge_lora(params, settings)
        save(config.out, loaded.model, merged, config.model if has_tokenizer else None, dtype=config.dtype)
        print(in_urls(f"{config.out}: {config.model} with {config.adapter} merged"))
        return 0
    leaves = dict(flatten(params))
    found = {
        "rank": settings.rank,
        "alpha": settings.alpha,
        "scale": settings.scale,
        "parameters": sum(leaf.size for path, leaf in leaves.items() if is_lora(path)),
        "adapted": [".".join(path[:-1]) for path in leaves if path[-1] == LORA_A],
    }
    print(json_text(found, "the adapter", indent=2))
    return 0
