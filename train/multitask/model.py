"""The model of a multi-task run: its encoders, of a size or from a checkpoint, its tokenizer and its preprocessing."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from ...data.corpus.corpus import Document
from ...data.images.processor import Processor
from ...data.tokenizers.loading import load_tokenizer
from ...data.tokenizers.tokenizer import Tokenizer
from ...data.tokenizers.training import train_tokenizer
from ...models.checkpoints.folder import load_with_report
from ...models.family import Family, Member
from ...models.images.vit import resized
from ...models.multimodal.unit import Unit, UnitConfig, UnitTask, bare_encoder
from ...models.once import jit_once
from ...models.registry import family_of, init_params, presets
from ..arguments import did_you_mean
from ..errors import RunError
from ..images.model import processor_of
from ..learner import compute_dtype, scans
from .config import TrainConfig
from .task_file import ImagePart, TaskFile, TextPart


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What makes inputs of images and of texts; saved beside the model."""

    processor: Processor | None
    tokenizer: Tokenizer | None
    longest: int  # maximum length of a text, in tokens

    def save(self, folder: Path) -> None:
        """Write the files of both."""
        for part in (self.processor, self.tokenizer):
            if part is not None:
                part.save(folder)


class Encoder(NamedTuple):
    """An encoder of a run."""

    member: Member
    params: Mapping[str, Any] | None  # of a checkpoint, on the host


class Start(NamedTuple):
    """The model that a run starts from."""

    model: Unit
    inputs: Inputs
    encoders: Mapping[str, Encoder]

    @property
    def loaded(self) -> bool:
        """Whether an encoder comes from a checkpoint."""
        return any(encoder.params is not None for encoder in self.encoders.values())

    def params(self, seed: int) -> Any:
        """Return new parameters, with those of the checkpoints, on the host."""
        held = {f"{side}_encoder": one.params for side, one in self.encoders.items() if one.params is not None}

        def draw(key: jax.Array) -> Any:
            params = nn.unbox(init_params(self.model, key))
            return {name: part for name, part in params.items() if name not in held}

        return {**jax.device_get(jit_once(draw)(jax.random.fold_in(jax.random.key(seed), 0))), **held}


def make_start(config: TrainConfig, file: TaskFile, tasks: Sequence[UnitTask], texts: Sequence[str]) -> Start:
    """Make the model.

    Args:
        config: settings of the run.
        file: the file of tasks.
        tasks: the tasks, with their classes.
        texts: training texts, for a tokenizer.

    Raises:
        RunError: an encoder is unknown, unsuitable, or does not fit its sizes.
        CheckpointError: a checkpoint cannot be read.
    """
    encoders: dict[str, Encoder] = {}
    processor = tokenizer = None
    longest = 0
    if file.image is not None:
        encoders["image"], processor = image_encoder(file.image, config)
    if file.text is not None:
        encoders["text"], tokenizer = text_encoder(file.text, config, texts)
        most = encoders["text"].member.config.max_length
        longest = file.text.max_length
        if most is not None and longest > most:
            raise RunError(f"{config.config}, [text]: max_length is {longest}, beyond the encoder's {most} positions.")
    decoder = file.decoder
    try:
        found = UnitConfig(
            width=decoder.width,
            layers=decoder.layers,
            heads=decoder.heads,
            feed_forward=decoder.feed_forward,
            dropout=decoder.dropout,
            attention_dropout=decoder.dropout,
            text_length=longest or None,
            tasks=tuple(tasks),
            **{side: encoder.member for side, encoder in encoders.items()},
            **_run_fields(config, [decoder.layers, *(encoder.member.config.layers for encoder in encoders.values())]),
        )
    except ValueError as error:
        raise RunError(f"{config.config}: {str(error).removeprefix('UnitConfig: ')}") from None
    return Start(Unit(found), Inputs(processor, tokenizer, longest), encoders)


def _run_fields(config: TrainConfig, layers: Sequence[int]) -> dict[str, Any]:
    return dict(
        dtype=compute_dtype(config.dtype),
        remat=config.remat,
        scan_layers=scans(config.scan_layers, max(layers)),
        attention_implementation=config.attention,
    )


def image_encoder(part: ImagePart, config: TrainConfig) -> tuple[Encoder, Processor]:
    """Return the encoder of images, and its preprocessing to square images of one size."""
    where = f"{config.config}, [image]"
    if part.checkpoint is None:
        family = _family(part.model, "images", where)
        preset: Any = family.config.preset(part.model)
        side = part.image_size or preset.image_size
        changes = _sizes(part) | {"image_size": side, "patch_size": part.patch_size or preset.patch_size}
        member = _changed(Member(family, preset), where, changes, part.dropout)
        half = (0.5,) * 3
        return Encoder(member, None), Processor((side, side), mean=half, std=half)
    loaded, _ = load_with_report(part.checkpoint, head="encoder")
    member = _member(loaded.config, "images", f"{where}: {part.checkpoint}")
    model, params = loaded.model, loaded.params
    processor = processor_of(part.checkpoint, loaded.config)
    side = part.image_size or loaded.config.image_size
    if side != loaded.config.image_size:
        if side % loaded.config.patch_size:
            raise RunError(f"{where}: image_size {side} is not a multiple of patch size {loaded.config.patch_size}.")
        model, params = resized(model, params, side)
    member = _changed(member._replace(config=model.config), where, {}, part.dropout)
    if processor.output != (side, side):
        processor = dataclasses.replace(processor, size=(side, side), crop=None)
    return Encoder(member, _bare(member, params)), processor


def text_encoder(part: TextPart, config: TrainConfig, texts: Sequence[str]) -> tuple[Encoder, Tokenizer]:
    """Return the encoder of texts, and its tokenizer: a checkpoint's, a folder's, or one trained on the texts."""
    where = f"{config.config}, [text]"
    if part.checkpoint is None:
        family = _family(part.model, "text", where)
        preset: Any = family.config.preset(part.model)
        if not hasattr(family.config, "vocabulary_fields") or not hasattr(preset, "layers"):
            raise RunError(f"{where}: {part.model}: {family.title} is no encoder of one stack of layers.")
        if part.tokenizer is not None:
            tokenizer = load_tokenizer(part.tokenizer)
        else:
            kind: Any = family.tokenizers[0]
            documents = [Document(text, "lines", "the tasks' texts") for text in texts]
            tokenizer = train_tokenizer(kind, documents, vocab_size=part.vocab_size, family=family.tokenizer_like)
        changes = family.config.vocabulary_fields(tokenizer.vocab_size, tokenizer.special_ids)  # type: ignore[attr-defined]
        member = _changed(Member(family, preset), where, _sizes(part) | changes, part.dropout)
        return Encoder(member, None), tokenizer
    loaded, _ = load_with_report(part.checkpoint, head="encoder")
    member = _member(loaded.config, "text", f"{where}: {part.checkpoint}")
    if loaded.tokenizer is None:
        raise RunError(f"{part.checkpoint}: no tokenizer files in this folder (tokenizer.json or vocab.txt).")
    member = _changed(member, where, {}, part.dropout)
    return Encoder(member, _bare(member, loaded.params)), loaded.tokenizer


def _family(name: str, reads: str, where: str) -> Family:
    """Return the family of a size that reads images or text."""
    sizes = {size: family for size, family in presets().items() if family.reads == reads and "encoder" in family.heads}
    if name not in sizes:
        meant = did_you_mean(name, sizes) or f" Expected one of {', '.join(sizes)}."
        raise RunError(f"{where}: there is no encoder of {reads} called {name!r}.{meant}")
    return sizes[name]


def _member(config: Any, reads: str, where: str) -> Member:
    family = family_of(config)
    if family.reads != reads:
        raise RunError(f"{where}: {family.title} reads {family.reads}, not {reads}.")
    return Member(family, config)


def _sizes(part: ImagePart | TextPart) -> dict[str, Any]:
    """Return the sizes that a table gives; the inner width is four times the width."""
    found = {name: getattr(part, name) for name in ("width", "layers", "heads") if getattr(part, name) is not None}
    return found | ({"feed_forward": 4 * part.width} if part.width is not None else {})


def _changed(member: Member, where: str, changes: Mapping[str, Any], dropout: float) -> Member:
    """Return an encoder with changes to its config, without the checkpoint's own head."""
    own = dataclasses.replace(member.config, repeated=(), unprefixed=False)
    try:
        return member._replace(config=dataclasses.replace(own, **changes, **own.dropout_fields(dropout)))
    except ValueError as error:
        raise RunError(f"{where}: {error}") from None


def _bare(member: Member, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of an encoder without those of a pooler."""
    kept = {entry.path[0] for entry in bare_encoder(member).table(member.config).entries}
    return {name: part for name, part in params.items() if name in kept}
