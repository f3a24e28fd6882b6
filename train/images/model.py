"""The classifier to train: a new one of a released size, or a checkpoint with the classes of the data."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...data.images.processor import Processor
from ...data.images.sets import ImageSet
from ...models.checkpoints.folder import check_head, family_of_folder, load_with_report, read_config
from ...models.family import Family
from ...models.images.plain_vit import PlainViTConfig
from ...models.images.vit import resized
from ...models.registry import presets
from ..arguments import did_you_mean
from ..errors import RunError
from ..learner import compute_dtype, scans
from ..progress import Progress
from .config import FinetuneConfig, ImagesConfig, TrainConfig

SIDE = 7  # patches along a side, at least, where the patch size is chosen
LOOKED_AT = 1000  # images whose sizes and colours are looked at


class Start(NamedTuple):
    """The model that a run starts from."""

    model: Any
    params: Any | None  # on the host; None for new parameters
    processor: Processor


def run_fields(config: ImagesConfig, layers: int) -> dict[str, Any]:
    """Return the fields of the config of a model of so many layers that a run sets."""
    return dict(
        dtype=compute_dtype(config.dtype),
        remat=config.remat,
        scan_layers=scans(config.scan_layers, layers),
        attention_implementation=config.attention,
        dropout=config.dropout,
        attention_dropout=config.dropout,
    )


def image_family(family: Family, name: str) -> Family:
    """Return a family that reads images.

    Raises:
        RunError: it is another one.
    """
    if family.reads != "images":
        known = ", ".join(size for size, other in presets().items() if other.reads == "images")
        raise RunError(f"{name}: {family.title} reads {family.reads}, not images. Sizes that do: {known}.")
    return family


def new_model(config: TrainConfig, images: ImageSet) -> Start:
    """Make a new model for the images.

    Raises:
        RunError: there is no such size, patches do not fill the images, or a setting is not one of the family.
    """
    known = presets()
    if config.model not in known:
        sizes = [name for name, family in known.items() if family.reads == "images"]
        meant = did_you_mean(config.model, sizes) or f" Expected one of {', '.join(sizes)}."
        raise RunError(f"--model {config.model}: there is no such size.{meant}")
    family = image_family(known[config.model], f"--model {config.model}")
    preset: Any = family.config.preset(config.model)
    if config.initializer_range is not None and isinstance(preset, PlainViTConfig):
        raise RunError(f"--initializer-range: {family.title} draws new weights by the sizes of the layers.")
    side, channels = _look_at(images)
    size = config.image_size or side or preset.image_size
    given = {name: getattr(config, name) for name in ("width", "layers", "heads", "initializer_range")}
    fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if config.width is not None:
        fields["feed_forward"] = 4 * config.width
    try:
        found = dataclasses.replace(
            preset,
            image_size=size,
            patch_size=_patch_size(config.patch_size, preset.patch_size, size),
            channels=channels,
            num_labels=len(images.classes),
            label_names=images.classes,
            **fields,
            **run_fields(config, config.layers or preset.layers),
        )
    except ValueError as error:
        raise RunError(f"--model {config.model}: {error}") from None
    half = (0.5,) * channels
    processor = Processor((size, size), mean=half, std=half, channels=channels)
    return Start(family.build("classification", found), None, processor)


def _look_at(images: ImageSet) -> tuple[int | None, int]:
    """Return the side of square images if some of the set have the same, else None, and the number of channels."""
    chosen = np.unique(np.linspace(0, len(images.labels) - 1, min(LOOKED_AT, len(images.labels))).astype(int))
    shapes = {images.pixels(number, None).shape for number in chosen.tolist()}
    sizes, channels = {shape[:2] for shape in shapes}, max(shape[2] for shape in shapes)
    height, width = next(iter(sizes))
    return height if len(sizes) == 1 and height == width else None, channels


def _patch_size(asked: int | None, preset: int, size: int) -> int:
    if asked is not None:
        return asked
    fitting = [side for side in range(1, preset + 1) if size % side == 0 and size // side >= SIDE]
    return max(fitting, default=1)


def loaded_model(config: FinetuneConfig, images: ImageSet, progress: Progress) -> Start:
    """Load a checkpoint with a head for the classes of the data, at the size of the images asked for.

    Raises:
        CheckpointError: the family is unsuitable, or tensors do not fit.
        RunError: the family does not read images, or patches do not fill them.
    """
    stored = read_config(config.model)
    family = image_family(family_of_folder(stored, config.model), str(config.model))
    check_head(family, "classification", config.model)
    own: Any = family.config.from_json(stored)
    if config.freeze_layers > own.layers:
        raise RunError(f"--freeze-layers is {config.freeze_layers}, but the model has {own.layers}.")
    fields = run_fields(config, own.layers) | {"num_labels": len(images.classes), "label_names": images.classes}
    loaded, report = load_with_report(config.model, head="classification", seed=config.seed, **fields)
    model, params = loaded.model, dict(loaded.params)
    new = list(report.initialised)
    if not new and own.label_names != images.classes:
        params["classifier"] = {name: np.zeros_like(leaf) for name, leaf in params["classifier"].items()}
        new.append(f"the last layer, whose classes are {', '.join((own.label_names or ('not named',))[:10])}")
    if new:
        progress.line(f"newly initialised (not in checkpoint {config.model}): {', '.join(new)}")
    processor = processor_of(config.model, own)
    size = config.image_size or own.image_size
    if size != own.image_size:
        if size % own.patch_size:
            raise RunError(f"--image-size {size} is not a multiple of the model's patch size {own.patch_size}.")
        model, params = resized(model, params, size)
        progress.line(f"positions resized from {own.image_size} to {size} pixels ({own.resize})")
    if processor.output != (size, size):
        processor = dataclasses.replace(processor, size=(size, size), crop=None)
    return Start(model, params, processor)


def processor_of(folder: Path, config: Any) -> Processor:
    """Return the preprocessing of a checkpoint folder, or that of ViT's own if it has no file of it."""
    found = Processor.read(folder)
    if found is None:
        half = (0.5,) * config.channels
        side = config.image_size
        found = Processor((side, side), mean=half, std=half, channels=config.channels)
    if found.channels != config.channels:
        raise RunError(
            f"{folder}: preprocessor_config.json is for {found.channels} channels, the model has {config.channels}."
        )
    return found
