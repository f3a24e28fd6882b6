"""The TOML file of a multi-task run: the model's parts and the tasks.

    [image]                        # the encoder of images: a size and changes to it, or checkpoint = "FOLDER"
    model = "conv-vit-tiny"
    image_size = 64

    [text]                         # the encoder of texts; without a tokenizer, it is trained on the tasks' texts
    model = "bert-tiny"

    [decoder]
    width = 128

    [tasks.vqa]
    kind = "question-answering"    # or image-classification, text-classification
    data = "easy_vqa"
    share = 2.0

Every mistake is named with its table and key.
"""

import tomllib
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ...data.cloud.mirror import fetch, mirror, scheme_of
from ...data.json_files import fits, in_words, type_name
from ..arguments import did_you_mean
from ..errors import RunError, check_setting
from ..machine.stores import CHECKPOINTS, RUN

Kind = Literal["image-classification", "text-classification", "question-answering"]
KINDS: tuple[str, ...] = typing.get_args(Kind)
READS = {
    "image-classification": "image",
    "text-classification": "text",
    "question-answering": "image and text",
}
KEYS = {  # of tasks of some kinds only
    "image-classification": ("image", "label", "crop", "shift", "flip"),
    "text-classification": ("glue", "text", "text_pair", "label"),
    "question-answering": ("question", "answer", "image", "crop", "shift", "flip"),
}


@dataclass(frozen=True)
class ImagePart:
    """The encoder of images."""

    model: str = "conv-vit-tiny"
    """a size of `bestiary models` that reads images"""
    checkpoint: Path | None = None
    """checkpoint folder to start from, instead of a size"""
    image_size: int | None = None
    """side of the square images, in pixels; that of the size or of the checkpoint if none is given"""
    patch_size: int | None = None
    width: int | None = None
    layers: int | None = None
    heads: int | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class TextPart:
    """The encoder of texts."""

    model: str = "bert-tiny"
    """a size of `bestiary models` that reads text"""
    checkpoint: Path | None = None
    """checkpoint folder to start from, with its tokenizer, instead of a size"""
    tokenizer: Path | None = None
    """folder of a tokenizer, for a size; without one, it is trained on the tasks' training texts"""
    vocab_size: int = 8192
    """maximum vocabulary size of a tokenizer that is trained"""
    max_length: int = 64
    """maximum length of a text, in tokens: longer texts are cut off, longer questions refused"""
    width: int | None = None
    layers: int | None = None
    heads: int | None = None
    dropout: float = 0.1


@dataclass(frozen=True)
class DecoderPart:
    """The decoder."""

    width: int = 768
    layers: int = 6
    heads: int = 12
    feed_forward: int = 2048
    dropout: float = 0.1


@dataclass(frozen=True)
class TaskPart:
    """One task."""

    kind: Kind
    data: Path
    """images as for `bestiary images train`; a table of texts, or a folder of a GLUE task; questions as easy-VQA's
    files or a table"""
    eval_data: Path | None = None
    """a second table, to evaluate on"""
    held_out: float = 0.1
    """fraction of the training examples to evaluate on, if the data has neither a dev nor a test split"""
    head: str = "classification"
    loss: Literal["softmax", "sigmoid"] | None = None
    """cross-entropy of one class, or the sum of those of independent yes-or-no classes; none: sigmoid for
    question-answering, as the paper has it, else softmax"""
    share: float = 1.0
    """share of the batches, relative to the other tasks'"""
    queries: int = 25
    """number of the decoder's query vectors"""
    glue: str | None = None
    """name of a GLUE task whose files the data is"""
    text: str = "sentence"
    """column of the texts"""
    text_pair: str | None = None
    """column of the second texts of pairs"""
    question: str = "question"
    answer: str = "answer"
    image: str = "image"
    label: str = "label"
    crop: Literal["none", "shift", "inception"] = "none"
    """random crops of training images, as --crop of `bestiary images train`"""
    shift: int = 2
    flip: bool = False


@dataclass(frozen=True)
class TaskFile:
    """The whole file."""

    decoder: DecoderPart
    tasks: Mapping[str, TaskPart]
    image: ImagePart | None = None
    text: TextPart | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the content as JSON values, defaults included."""
        return jsonable(asdict(self))


def jsonable(value: Any) -> Any:
    """Return a tree of dictionaries with its paths as text."""
    if isinstance(value, dict):
        return {key: jsonable(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, Path) else value


def read_task_file(path: Path) -> TaskFile:
    """Read a file of tasks.

    Raises:
        RunError: it is missing or not TOML, a table or key is unknown, a value has the wrong type, a task, a head or an
            encoder is not one of this version, or no task reads what an encoder is for.
    """
    try:
        stored = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"--config {path}: there is no such file.") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RunError(f"{path}: not a TOML file ({error}).") from None
    _known(stored, ("image", "text", "decoder", "tasks"), f"{path}", "table")
    tasks = stored.get("tasks")
    if not isinstance(tasks, dict) or not tasks:
        raise RunError(f"{path}: no tasks. Expected a table [tasks.NAME] for each.")
    found = TaskFile(
        _part(DecoderPart, stored.get("decoder", {}), f"{path}, [decoder]", path.parent),
        {name: _task(task, f"{path}, [tasks.{name}]", path.parent) for name, task in tasks.items()},
        *(
            None if stored.get(side) is None else _encoder(of, stored[side], f"{path}, [{side}]", path.parent)
            for side, of in (("image", ImagePart), ("text", TextPart))
        ),
    )
    read: set[str] = set()
    for name, task in found.tasks.items():
        for side in READS[task.kind].split(" and "):
            if getattr(found, side) is None:
                raise RunError(f"{path}, [tasks.{name}]: {task.kind} needs an encoder: a table [{side}].")
            read.add(side)
    for side in ("image", "text"):
        if getattr(found, side) is not None and side not in read:
            raise RunError(f"{path}, [{side}]: no task reads {side}s. Leave the table out.")
    return found


def _task(stored: Any, where: str, folder: Path) -> TaskPart:
    if isinstance(stored, dict):
        kind, head = stored.get("kind"), stored.get("head", "classification")
        if "detection" in (kind, head) or head == "object-detection" or kind == "object-detection":
            raise RunError(f"{where}: detection is not implemented: no head predicts boxes. Expected {_or(KINDS)}.")
        if isinstance(kind, str) and kind not in KINDS:
            meant = did_you_mean(kind, KINDS) or f" Expected {_or(KINDS)}."
            raise RunError(f"{where}: there is no kind of task {kind!r}.{meant}")
        if head != "classification":
            raise RunError(f"{where}: there is no head {head!r}. Expected classification.")
    task: TaskPart = _part(TaskPart, stored, where, folder)
    others = {key for keys in KEYS.values() for key in keys} - set(KEYS[task.kind])
    _refuse(stored, others, task.kind, where)
    if task.glue is not None:
        _refuse(stored, ("eval_data", "text", "text_pair", "label"), "glue", where)
    return task


def _encoder(of: Any, stored: Any, where: str, folder: Path) -> Any:
    part = _part(of, stored, where, folder)
    if part.checkpoint is not None:
        _refuse(
            stored, ("model", "patch_size", "tokenizer", "vocab_size", "width", "layers", "heads"), "checkpoint", where
        )
    if "tokenizer" in stored:
        _refuse(stored, ("vocab_size",), "tokenizer", where)
    return part


def _refuse(stored: Mapping[str, Any], keys: Collection[str], beside: str, where: str) -> None:
    """Refuse keys that would have no effect beside another."""
    given = next((key for key in stored if key in keys), None)
    if given is not None:
        raise RunError(f"{where}: {given} does not go with {beside}.")


def _part(of: Any, stored: Any, where: str, folder: Path) -> Any:
    """Read a table of the file into a dataclass."""
    if not isinstance(stored, dict):
        raise RunError(f"{where}: expected a table, found {in_words(stored)}.")
    hints = typing.get_type_hints(of)
    _known(stored, hints, where, "key")
    values = {}
    for one in fields(of):
        if one.name not in stored:
            if one.default is MISSING:
                raise RunError(f"{where}: the key {one.name!r} is missing.")
            continue
        value, kind = stored[one.name], hints[one.name]
        options = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
        is_path = Path in options
        kinds = [str if option is Path else option for option in options if option is not types.NoneType]
        if not any(fits(value, option) for option in kinds):
            expected = " or ".join(map(type_name, kinds))
            raise RunError(f"{where}: {one.name}: expected {expected}, found {in_words(value)}.")
        if is_path:
            value = Path(value) if value.startswith("tfds:") else _place(folder, value)
        values[one.name] = value
    part = of(**values)
    for name in ("image_size", "patch_size", "width", "layers", "heads", "feed_forward", "queries", "vocab_size"):
        _bounds(part, name, where, least=1)
    _bounds(part, "max_length", where, least=3)
    _bounds(part, "dropout", where, least=0, below=1)
    _bounds(part, "held_out", where, above=0, below=1)
    _bounds(part, "share", where, above=0)
    _bounds(part, "shift", where, least=0)
    return part


def _place(folder: Path, value: str) -> Path:
    """Return a path of a task file; one of an object store is fetched from there."""
    path = folder / value if scheme_of(value) is None else mirror(value)
    fetch(path, missing=True, left_out=lambda names: CHECKPOINTS if names >= RUN else "")
    return path


def _bounds(part: Any, name: str, where: str, **bounds: float) -> None:
    if hasattr(part, name):
        try:
            check_setting(part, name, **bounds)
        except RunError as error:
            raise RunError(f"{where}: {str(error).removeprefix('--')}") from None


def _known(stored: Mapping[str, Any], known: Any, where: str, what: str) -> None:
    unknown = [name for name in stored if name not in known]
    if unknown:
        meant = did_you_mean(unknown[0], known) or f" Expected {_or(tuple(known))}."
        raise RunError(f"{where}: there is no {what} {unknown[0]!r}.{meant}")


def _or(names: tuple[str, ...]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
