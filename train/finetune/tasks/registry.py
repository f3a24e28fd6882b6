"""Fine-tuning tasks by name, and the task described by a run folder's task.json."""

import typing
from collections.abc import Callable, Mapping
from typing import Any

from ....data.json_files import value_of
from ....data.tasks.glue import FINETUNED
from ...errors import RunError
from .choice import ChoiceTask
from .glue import GlueTextTask
from .squad import SquadTask
from .table import TableTask
from .tagging import TaggingTask
from .task import Task

TASKS: dict[str, Callable[..., Task]] = {
    **dict.fromkeys(FINETUNED, GlueTextTask),
    "classification": TableTask,
    "squad": SquadTask,
    "swag": ChoiceTask,
    "codah": ChoiceTask,
    "ner": TaggingTask,
    "pos": TaggingTask,
}


def make_task(stored: Mapping[str, Any], where: str) -> Task:
    """Return the task described by a task.json.

    Raises:
        RunError: it names a task that this version does not have, or settings that the task does not have.
        DataError: a setting has another type.
    """
    name = value_of(stored, "name", str, where)
    if name not in TASKS:
        raise RunError(f"{where}: {name!r} is not a task of this version; known: {', '.join(TASKS)}.")
    make: Any = TASKS[name]
    hints = typing.get_type_hints(make)
    for key in stored:
        if key not in hints:
            raise RunError(f"{where}: {key!r} is no setting of {name}.")
        value = value_of(stored, key, hints[key], where)
        counts = hints[key] is int and not key.endswith("_column")
        if counts and not 1 <= value < 1 << 31:
            raise RunError(f"{where}: {key} is {value}; it must be from 1 to {(1 << 31) - 1:,}.")
    try:
        return make(**{key: _tuples(value) for key, value in stored.items()})
    except (TypeError, ValueError) as error:
        raise RunError(f"{where}: not the settings of {name} ({error}).") from None


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value
