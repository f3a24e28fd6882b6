"""Settings of `bestiary images`. Does not import JAX, so that `--help` is fast."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ..config import FREE as EVERY_FREE
from ..config import AdaptConfig, Attention, LoopConfig, OptimConfig, ParallelConfig
from ..errors import MOST_SEED, RunError, check_setting


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to training images at random."""

    crop: Literal["none", "shift", "inception"] = "none"
    """Random crops: shift moves an image by up to --shift pixels; inception cuts out a part of --least-area to all of
    the area and resizes it."""
    shift: int = 2
    """Largest shift of --crop shift, in pixels; what comes in is zero."""
    least_area: float = 0.05
    """Least fraction of the area that --crop inception keeps."""
    flip: bool = False
    """Mirror every other image."""
    randaugment: int = 0
    """Number of operations of RandAugment per image; 0: none."""
    magnitude: float = 10.0
    """Strength of RandAugment's operations, from 0 to 10."""
    mixup: float = 0.0
    """Mix every image with another one, by a share from Beta(a, a) with this a, at most 2; 0: never."""

    def __post_init__(self) -> None:
        for name in ("shift", "randaugment", "magnitude"):
            check_setting(self, name, least=0)
        check_setting(self, "mixup", least=0, most=2)
        check_setting(self, "least_area", above=0, most=1)


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Settings shared by training from scratch and fine-tuning."""

    data: Path
    """Labelled images: a folder of IDX files (MNIST), of CIFAR's binary files, or with a folder for each class, also
    within folders train, val and test; a .zip of such folders; a table (.csv, .tsv, .jsonl) of paths and labels; or a
    prepared tensorflow-datasets folder, or tfds:NAME."""
    eval_data: Path | None = None
    """A second table, to evaluate on."""
    path_column: str = "image"
    """Column of a table that holds the images' paths, relative to the table's folder; or feature of a data set."""
    label_column: str = "label"
    """Column of a table, or feature of a data set, that holds the classes."""
    held_out: float = 0.1
    """Fraction of the training images to hold out for evaluation, if the data has neither a dev nor a test split."""
    train_examples: int = 0
    """Number of training images to sample; 0: all."""

    image_size: int | None = None
    """Side of the square images that the model gets, in pixels. None: that of the data if all images are of one size
    (training), or of the checkpoint (fine-tuning); else that of the model's size."""
    augment: Annotated[AugmentConfig, tyro.conf.arg(name="")] = field(default_factory=AugmentConfig)
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """Loss: cross-entropy of one class, or sigmoid, the sum of those of independent yes-or-no classes (Beyer et al.
    2020)."""
    label_smoothing: float = 0.0
    """Fraction of the probability that is spread evenly over all classes."""
    epochs: float = 10.0
    """Number of passes over the training images."""
    steps: int = 0
    """Number of updates, instead of --epochs."""
    batch_size: int = 128
    """Images per update."""
    accumulate: int = 1
    """Number of gradient-accumulation micro-batches: parts of a batch that are computed in turn, to save memory. The
    results stay the same."""
    dropout: float = 0.0
    """Dropout rate of hidden states and attention probabilities."""
    seed: int = 0
    """Seed of new parameters, of the order of the images, of augmentation and dropout."""
    threads: int = 2
    """Number of threads that read and augment images."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the computation; parameters are always float32. auto: bfloat16 on an accelerator, float32 on a
    CPU."""
    remat: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more computation."""
    scan_layers: bool | None = None
    """Compile one layer and loop over it. Off: unroll the layers, with the same results and faster steps, but longer
    compilation. None: unroll models of up to 8 layers."""
    attention: Attention | None = None
    """Attention backend. None: the fastest that supports the call."""

    evaluate_epochs: float = 1.0
    """Epochs between evaluations, unless --evaluate-every says otherwise; there is always one at the end."""
    patience: int = 0
    """Early stopping: stop after this many consecutive evaluations that are no better than the best; 0: never."""
    select: Literal["last", "best"] | None = None
    """Which checkpoint to export: the last, or that of the best evaluation. None: best with --patience, else last."""
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(default_factory=LoopConfig)
    out: Path
    """Run folder. To resume a run that was stopped, give the same command again."""
    resume_from: Path | None = None
    """Run folder, or one step of its checkpoints, from which a new run continues, with optimiser state and data
    position."""
    parallelism: Annotated[ParallelConfig, tyro.conf.arg(name="")] = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        check_setting(self, "seed", least=0, most=MOST_SEED)
        for name in ("batch_size", "accumulate", "threads", "image_size"):
            check_setting(self, name, least=1)
        for name in ("steps", "train_examples", "patience"):
            check_setting(self, name, least=0)
        for name in ("dropout", "label_smoothing"):
            check_setting(self, name, least=0, below=1)
        check_setting(self, "held_out", above=0, below=1)
        check_setting(self, "evaluate_epochs", above=0)
        if not self.steps:
            check_setting(self, "epochs", above=0)
        if self.loss == "sigmoid" and self.label_smoothing:
            raise RunError("--label-smoothing goes with --loss softmax.")
        if self.batch_size % self.accumulate:
            raise RunError(f"--batch-size {self.batch_size} is not a multiple of --accumulate {self.accumulate}.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ImagesConfig):
    """Train an image classifier from scratch, as the plain ViT's baseline is trained (Beyer et al. 2022)."""

    model: str = "vit-tiny"
    """Size, one of `bestiary models`: vit-tiny, vit-small, vit-base, ...; plain-vit-small, ... for the baseline's own
    variant, which the reference implementation cannot load."""
    patch_size: int | None = None
    """Side of a patch, in pixels. None: that of the size if images have 7 x 7 such patches or more, else the largest of
    which they do."""
    width: int | None = None
    """Size of the hidden states; the inner width of feed-forward layers is four times it. None: that of the size."""
    layers: int | None = None
    """Number of layers. None: that of the size."""
    heads: int | None = None
    """Number of attention heads. None: that of the size."""
    initializer_range: float | None = None
    """Standard deviation of new weights of a ViT. None: 0.02, with which a narrow model learns nothing at first; 0.1
    suits a width of 64."""
    optim: Annotated[OptimConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: OptimConfig(
            learning_rate=1e-3,
            warmup=0.05,
            schedule="cosine",
            weight_decay=1e-4,
            independent_decay=True,
            decay_embeddings=False,
            epsilon=1e-8,
        )
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("patch_size", "width", "layers", "heads"):
            check_setting(self, name, least=1)
        check_setting(self, "initializer_range", above=0)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(ImagesConfig):
    """Fine-tune an image classifier from a checkpoint, on other classes or images of another size."""

    model: Path
    """Checkpoint folder to start from (config.json, model.safetensors, preprocessor_config.json). Its classes are kept
    if they are those of the data; else the last layer is newly initialised, with zeros."""
    freeze_layers: int = 0
    """Freeze the embeddings and this many of the lowest layers; 0: freeze nothing."""
    layer_decay: float = 1.0
    """Factor from each layer's learning rate to that of the layer below; the last layer has the full rate."""
    adapt: Annotated[AdaptConfig, tyro.conf.arg(name="")] = field(default_factory=AdaptConfig)
    optim: Annotated[OptimConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: OptimConfig(
            learning_rate=1e-4, warmup=0.1, schedule="cosine", weight_decay=0.0, epsilon=1e-8
        )
    )
    epochs: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting(self, "freeze_layers", least=0)
        check_setting(self, "layer_decay", above=0, most=1)


# Settings that change neither the numbers of a run nor what it exports: they may change when it is resumed.
FREE = (*EVERY_FREE, "threads")


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Print the classes of images, one JSON object per image."""

    run: tyro.conf.Positional[Path]
    """Folder of a finished run, or a checkpoint folder of an image classifier."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Images, or folders of images."""
    top: int = 5
    """Number of classes to show, the most probable first."""
    attention: Path | None = None
    """PNG file to draw of one image: the last layer's attention over the picture."""
    batch_size: int = 32
    """Images that are computed together."""
    parallelism: Annotated[ParallelConfig, tyro.conf.arg(name="")] = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        for name in ("top", "batch_size"):
            check_setting(self, name, least=1)
        if not self.images:
            raise RunError("Give images to predict, or folders of them.")
        first, *others = self.images
        if self.attention is not None and (others or first.is_dir()):
            raise RunError("--attention draws one image; give one.")


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Turn images into vectors: a float32 array [images, width] in NumPy's format, in the order of the images."""

    model: tyro.conf.Positional[Path]
    """Folder of a finished run, or a checkpoint folder of an encoder of images."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Images, or folders of images."""
    layers: str = "-1"
    """Layers to take hidden states from, as numbers separated by commas: 0 is the embeddings, 1 the first layer, -1 the
    last; `all` for every layer."""
    combine: Literal["sum", "mean", "concat"] = "mean"
    """How to combine several layers."""
    pooling: Literal["cls", "mean"] | None = None
    """How to make one vector per image: cls, the first token, or the mean over the patches. None: cls if the model has
    it, else mean."""
    normalize: bool = False
    """Scale each vector to length 1."""
    batch_size: int = 32
    """Images that are computed together."""
    out: Path
    """File to write, .npy."""

    def __post_init__(self) -> None:
        check_setting(self, "batch_size", least=1)
        if not self.images:
            raise RunError("Give images to embed, or folders of them.")
        if self.out.suffix != ".npy":
            raise RunError(f"--out {self.out}: expected a name that ends in .npy.")


def stored_settings(config: Any) -> dict[str, Any]:
    """Return the settings of augmentation as those of `data.images.augment.Augmentation`."""
    augment: AugmentConfig = config.augment
    return dict(
        crop=augment.crop,
        shift=augment.shift,
        least_area=augment.least_area,
        flip=augment.flip,
        operations=augment.randaugment,
        magnitude=augment.magnitude,
        mixup=augment.mixup,
    )
