"""Inspect a command line before it is parsed: which flags it gives; and parse values that several commands have."""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from typing import Annotated, get_args, get_origin

import tyro

from .errors import RunError

# Flags of earlier versions -> what to give instead.
RENAMED = {
    "take": "--select",
    "next_sentence": "--objective mlm+nsp",
    "no_next_sentence": "--objective mlm",
    "decay": "--schedule",
}


def flags(arguments: Sequence[str]) -> dict[str, str]:
    """Find the flags that a command line gives.

    A parsed config cannot tell a flag that was given its default value from one that was not given. This can: for
    defaults that depend on another flag, and to refuse a flag that another one makes meaningless.

    Args:
        arguments: the arguments after the command.

    Returns:
        The flags' names, with underscores and without dashes, each with its value or the argument after it.
    """
    found = {}
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        if argument.startswith("--"):
            name, equals, value = argument.removeprefix("--").partition("=")
            found[name.replace("-", "_")] = value if equals else following
    return found


def did_you_mean(asked: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'bert-base'?`, or nothing if no known name is similar."""
    near = get_close_matches(asked, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def reflow_help(options: type) -> None:
    """Let the help texts of a config dataclass flow to the width of the terminal.

    tyro keeps the line breaks of indented docstrings, unless the text is given in the annotation.
    """
    import docstring_parser

    for owner in filter(is_dataclass, options.__mro__):
        texts = {field.arg_name: field.description for field in docstring_parser.parse_from_object(owner).params}
        for name, annotation in inspect.get_annotations(owner).items():  # pyright: ignore[reportArgumentType]
            nested = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
            if is_dataclass(nested):
                reflow_help(nested)  # pyright: ignore[reportArgumentType]
            elif text := texts.get(name):
                help = " ".join(text.split())
                owner.__annotations__[name] = Annotated[annotation, tyro.conf.arg(help=help)]


def refuse_renamed(arguments: Sequence[str]) -> None:
    """Raise RunError for a flag of an earlier version, and say what it is called now."""
    for name in flags(arguments):
        if name in RENAMED:
            raise RunError(f"--{name.replace('_', '-')} is now {RENAMED[name]}.")


def parse_layers(text: str, count: int) -> tuple[int, ...]:
    """Parse `--layers`, such as `-1,-2`, for a model with `count` layers; 0 is the embeddings.

    Raises:
        RunError: not numbers, or not layers of this model.
    """
    if text == "all":
        return tuple(range(count + 1))
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise RunError(f"--layers {text}: expected numbers separated by commas, such as -1,-2, or all.") from None
    wrong = [number for number in numbers if not -count - 1 <= number <= count]
    if wrong:
        raise RunError(
            f"--layers {text}: there is no layer {wrong[0]}. This model has 0 (the embeddings) to {count}, which are "
            f"also {-count - 1} to -1."
        )
    return tuple(number % (count + 1) for number in numbers)
