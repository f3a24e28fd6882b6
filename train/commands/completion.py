"""Completion of commands and flags in a shell: `bestiary --completion bash`."""

import argparse
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import shtab

from ..errors import RunError

FLAG = re.compile(r"^[│ ] (--[a-z0-9-]+)(?:, (--no-[a-z0-9-]+))?(?: (\S+))?", re.MULTILINE)


def script(shell: str, commands: Mapping[tuple[str, ...], str], help_of: Callable[[tuple[str, ...]], str],
           values: Callable[[tuple[str, ...]], Iterable[str]]) -> str:  # fmt: skip
    """Return the script that completes commands, their flags, choices and files.

    Args:
        shell: bash, zsh or tcsh.
        commands: words of a command -> what it does.
        help_of: words of a command -> its --help.
        values: words of a command -> values of its first argument, such as the tasks of `finetune`.

    Raises:
        RunError: another shell.
    """
    if shell not in shtab.SUPPORTED_SHELLS:
        raise RunError(f"--completion {shell}: expected one of {', '.join(shtab.SUPPORTED_SHELLS)}.")
    commands = {words: what for words, what in commands.items() if not words[-1].startswith("--")}  # no variants
    root = argparse.ArgumentParser("bestiary")
    groups: dict[tuple[str, ...], Any] = {(): root.add_subparsers()}
    parents = {words[:most]: "" for words in commands for most in range(1, len(words))}
    for words, what in sorted((parents | dict(commands)).items(), key=lambda command: len(command[0])):
        parser = groups[words[:-1]].add_parser(words[-1], help=_plain(what))
        if words in commands:
            _add_flags(parser, help_of(words))
        if words in parents:
            groups[words] = parser.add_subparsers()
            for value in values(words):
                _add_flags(groups[words].add_parser(value, help=_plain(what)), help_of(words))
    return shtab.complete(root, shell)


def _add_flags(parser: argparse.ArgumentParser, text: str) -> None:
    for name, opposite, metavar in FLAG.findall(text):
        if name == "--help":
            continue
        choices = re.fullmatch(r"\{([^{}]+)\}", metavar)
        named = [choice for choice in choices[1].split(",") if choice != "None"] if choices else None
        if opposite or not metavar:
            parser.add_argument(name, *filter(None, [opposite]), action="store_true")
        else:
            argument = parser.add_argument(name, choices=named)
            if "PATH" in metavar:
                argument.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]


def _plain(text: str) -> str:
    """Return a text in which argparse reads no format."""
    return text.replace("%", "%%")
