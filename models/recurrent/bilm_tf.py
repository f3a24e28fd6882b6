"""Read ELMo's released files, those of allenai/bilm-tf: options.json and HDF5, which needs h5py (`bestiary[elmo]`)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.tables import CheckpointError
from .elmo import CHARACTERS, Elmo, ElmoConfig


def read_bilm(options: Path, weights: Path) -> tuple[Elmo, dict[str, Any]]:
    """Read a released model, options.json and HDF5; return the model and its parameters.

    Raises:
        CheckpointError: h5py is not installed, a file is missing or damaged, or an array is missing or has another
            shape.
    """
    config = bilm_config(options)
    try:
        import h5py
    except ModuleNotFoundError:
        raise CheckpointError(f"{weights}: HDF5 needs h5py: pip install 'bestiary[elmo]'") from None
    if not weights.is_file():
        raise CheckpointError(f"{weights}: there is no such file")
    try:
        with h5py.File(weights, "r") as handle:
            stored = {}
            handle.visititems(
                lambda name, item: stored.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None
            )
    except OSError as error:
        raise CheckpointError(f"{weights}: not an HDF5 file: {error}") from None
    model = Elmo(config)
    return model, _from_bilm(config, stored, str(weights))


def bilm_config(options: Path) -> ElmoConfig:
    """Read bilm-tf's options.json.

    Raises:
        CheckpointError: it is no such file, or describes another kind of model.
    """
    try:
        found: Any = json.loads(options.read_text())
        lstm, cnn = found["lstm"], found["char_cnn"]
        if cnn["activation"] != "relu" or cnn["n_characters"] not in (CHARACTERS - 1, CHARACTERS):
            raise CheckpointError(f"{options}: expected activation relu and 261 or 262 characters")
        return ElmoConfig(
            character_width=cnn["embedding"]["dim"],
            filters=tuple(number for pair in cnn["filters"] for number in pair),
            highways=cnn["n_highway"],
            most_characters=cnn["max_characters_per_token"],
            width=lstm["projection_dim"],
            cells=lstm["dim"],
            layers=lstm["n_layers"],
            cell_clip=float(lstm["cell_clip"]),
            projection_clip=float(lstm["proj_clip"]),
            residual=bool(lstm["use_skip_connections"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{options}: expected bilm-tf's options.json: {error!r}") from None


def _from_bilm(c: ElmoConfig, stored: Mapping[str, np.ndarray], where: str) -> dict[str, Any]:
    """Name bilm-tf's arrays as the model does. TensorFlow's gates are input, candidate, forget, output."""
    lacking: list[str] = []
    taken: set[str] = set()

    def take(name: str, *shape: int) -> np.ndarray:
        taken.add(name)
        if name not in stored or stored[name].shape != shape:
            lacking.append(f"{name} {list(shape)}")
            return np.zeros(shape, np.float32)
        return stored[name].astype(np.float32)

    def ordered(array: np.ndarray) -> np.ndarray:
        enter, candidate, forget, leave = np.split(array, 4, axis=-1)
        return np.concatenate([enter, forget, candidate, leave], axis=-1)

    size = sum(count for _, count in c.pairs)
    words: dict[str, Any] = {"characters": {"embedding": take("char_embed", CHARACTERS - 1, c.character_width)}}
    for number, (width, count) in enumerate(c.pairs):
        kernel = take(f"CNN/W_cnn_{number}", 1, width, c.character_width, count)
        words[f"filter_{number}"] = {"kernel": kernel.reshape(-1, count), "bias": take(f"CNN/b_cnn_{number}", count)}
    for number in range(c.highways):
        # What the code calls carry is the gate of what is transformed.
        for name, theirs in (("gate", "carry"), ("change", "transform")):
            at = f"CNN_high_{number}"
            words[f"{name}_{number}"] = {
                "kernel": take(f"{at}/W_{theirs}", size, size),
                "bias": take(f"{at}/b_{theirs}", size),
            }
    words["project"] = {
        "kernel": take("CNN_proj/W_proj", size, c.width),
        "bias": take("CNN_proj/b_proj", c.width),
    }
    params: dict[str, Any] = {"words": words}
    for direction, name in enumerate(("ahead", "back")):
        for layer in range(c.layers):
            at = f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell"
            both = ordered(take(f"{at}/W_0", 2 * c.width, 4 * c.cells))
            params[f"{name}_{layer}"] = {
                "input": {"kernel": both[: c.width], "bias": ordered(take(f"{at}/B", 4 * c.cells))},
                "state": {"kernel": both[c.width :]},
                "project": {"kernel": take(f"{at}/W_P_0", c.cells, c.width)},
            }
    if lacking:
        raise CheckpointError(f"{where}: arrays that are missing or of another shape: {', '.join(lacking[:20])}")
    if surplus := sorted(set(stored) - taken):
        raise CheckpointError(f"{where}: arrays that options.json does not describe: {', '.join(surplus[:20])}")
    return params
