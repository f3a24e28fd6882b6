"""Compute the logits of images, in batches of one shape."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from ...data.images.decode import decode
from ...data.images.processor import Processor
from ...data.images.stream import Batch
from ...models import load
from ...models.heads.with_head import encoder_inputs
from ...models.registry import family_of, init_params
from ..config import ParallelConfig
from ..errors import RunError
from ..learner import place
from ..loop import Stop
from ..progress import Progress, Work
from ..sharding import Parallelism, Replicas, logical_specs, start_parallelism
from .model import image_family, processor_of


class Classifier:
    """Run a model on batches of images.

    Args:
        model: the model.
        parallelism: the devices.
        progress: where to show progress.
    """

    def __init__(self, model: Any, parallelism: Parallelism, progress: Progress):
        self._parallelism, self._progress = parallelism, progress

        def step(params: Any, batch: Any, replicas: Replicas) -> jax.Array:
            return replicas.gather(model.apply({"params": params}, *encoder_inputs(model.config, batch)))

        self._step = parallelism.compile_evaluate(step)

    def __call__(self, params: Any, batches: Iterable[Batch], total: int, stop: Stop | None = None) -> Any:
        """Compute the logits of all images, [total, classes] float32 on the host; None if stopped.

        Args:
            params: parameters on the devices.
            batches: batches whose size the devices divide; what fills up the last one has weight 0.
            total: number of images.
            stop: checked after every batch.

        Raises:
            RunError: the model computes NaN.
        """
        work, found = Work(self._progress, "predicting", total, "images"), []
        for batch in batches:
            rows = len(batch["weights"])
            index, count = self._parallelism.share(rows)
            part = slice(index * rows // count, (index + 1) * rows // count)
            placed = self._parallelism.shard_batch({"pixel_values": batch["pixel_values"][part]})
            logits = np.asarray(jax.device_get(self._step(params, placed)), np.float32)
            found.append(logits[batch["weights"] > 0])
            work.update(sum(map(len, found)))
            if stop is not None and stop.requested:
                return None
        logits = np.concatenate(found)
        if np.isnan(logits).any():
            raise RunError("the model's logits are not numbers (NaN) for some images: nothing is predicted.")
        return logits


class Opened(NamedTuple):
    """A classifier that is ready to predict."""

    classifier: Classifier
    model: Any
    params: Any
    processor: Processor
    divisor: int  # of which the rows of a batch must be a multiple


def model_folder(folder: Path) -> Path:
    """Return the checkpoint folder of a finished run, or the folder itself if it is one."""
    return folder / "model" if (folder / "model" / "config.json").is_file() else folder


class ImageFiles:
    """Image files, preprocessed.

    Args:
        paths: the files.
        processor: preprocessing; its output must have one size.
        where: the checkpoint folder, for messages.

    Raises:
        RunError: preprocessing gives images of several sizes.
    """

    def __init__(self, paths: Sequence[Path], processor: Processor, where: Path):
        if processor.output is None:
            raise RunError(f"{where}: its preprocessing gives images of several sizes; expected do_resize or a crop.")
        self.paths, self._processor = paths, processor

    def fitted(self, number: int) -> np.ndarray:
        """Return an image [height, width, channels] uint8, of the model's size."""
        path = self.paths[number]
        return self._processor.fit(decode(path.read_bytes(), str(path), self._processor.channels))

    def batches(self, size: int) -> Iterator[tuple[range, Batch]]:
        """Yield all images once: their numbers, and pixel_values [size, H, W, C] and weights [size], 0 for none."""
        for first in range(0, len(self.paths), size):
            numbers = range(first, min(first + size, len(self.paths)))
            pixels = self._processor.normalise(np.stack([self.fitted(number) for number in numbers]))
            filled = np.concatenate([pixels, np.repeat(pixels[-1:], size - len(pixels), axis=0)])
            yield numbers, {"pixel_values": filled, "weights": (np.arange(size) < len(pixels)).astype(np.float32)}


def open_classifier(folder: Path, config: ParallelConfig) -> Opened:
    """Open the model of a finished run, or of a checkpoint folder.

    Raises:
        RunError: it is no classifier of images.
    """
    path = model_folder(folder)
    loaded = load(path)
    image_family(family_of(loaded.config), str(path))
    if "classifier" not in loaded.params:
        raise RunError(f"{path}: a model without classes. `bestiary images finetune` gives it some.")
    parallelism = start_parallelism(config)

    def initial() -> Any:
        return init_params(loaded.model, jax.random.key(0))

    shapes = parallelism.abstract(lambda: nn.unbox(initial()), logical_specs(jax.eval_shape(initial)))
    params = jax.tree.map(place, shapes, loaded.params)
    classifier = Classifier(loaded.model, parallelism, Progress())
    processor = processor_of(path, loaded.config)
    return Opened(classifier, loaded.model, params, processor, parallelism.divisor)
