"""Divide the arguments of `bestiary plan COMMAND` into its own and the command's."""

import re
from collections.abc import Sequence
from dataclasses import fields

from .config import PlanConfig

CHIPS = re.compile(r"[\w]+:[\dx]+")
"""A target of chips, by which `--target` is told from translation's file of that name."""


def divide(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return (arguments of the plan, command with its arguments)."""
    values = {f"--{field.name}": field.type is not bool for field in fields(PlanConfig)}
    own: list[str] = []
    rest: list[str] = []
    left = list(arguments)
    translates = "translate" in arguments  # not always first: flags of the plan may precede it
    while left:
        argument = left.pop(0)
        flag, equals, value = argument.partition("=")
        takes = values.get(flag)
        if takes and not equals:
            value = left[0] if left else ""
        if takes is None or (flag == "--target" and translates and not CHIPS.fullmatch(value)):
            rest.append(argument)
        elif takes and not equals:
            own += [argument, *left[:1]]
            left = left[1:]
        else:
            own.append(argument)
    return own, rest
