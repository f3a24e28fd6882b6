"""Distillation of a fine-tuned teacher into a smaller student of the same task.

To the task's loss comes the divergence of the student's predictions from the teacher's at a temperature T, times T², so
that its gradient keeps its size (Hinton et al. 2015, 2; DistilBERT's run_squad_w_distillation.py). Of values, it is the
squared difference. The teacher reads the same rows, without dropout.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ...data.json_files import read_object
from ...models.checkpoints.config import read_labels
from ...models.checkpoints.folder import family_of_folder, read_config
from ...models.checkpoints.teacher import Teacher, load_teacher
from ...models.heads.distillation import divergence
from ..errors import RunError
from ..learner import compute_dtype
from .config import FinetuneConfig
from .tasks.tagging import features_shape
from .tasks.task import Arrays, Task


def task_teacher(config: FinetuneConfig, task: Task, tokenizer: Any) -> Teacher | None:
    """Read the teacher of a run's settings; None if there is none.

    Raises:
        RunError: the task cannot be distilled, the teacher's task, classes or states are others, or see `load_teacher`.
    """
    given = config.distil
    if given.teacher is None:
        return None
    if task.inimitable is not None:
        raise RunError(f"--teacher: {task.name} cannot be distilled: {task.inimitable}.")
    run = given.folder.parent / "task.json"
    taught = read_object(run) if run.is_file() else None
    if taught is not None and taught.get("name") != task.name:
        raise RunError(f"--teacher {given.teacher}: it was fine-tuned on {taught.get('name')}, not on {task.name}.")
    changes, stored = task.model_changes(), read_config(given.folder)
    wanted, held = changes.get("label_names"), read_labels(stored)
    if wanted is not None and held[1] is not None and held[1] != wanted:
        raise RunError(f"--teacher {given.teacher}: its classes are {', '.join(held[1])}, not {', '.join(wanted)}.")
    states: Any = getattr(family_of_folder(stored, given.folder).config.from_json(stored), "features", ())
    other = taught is not None and taught.get("features_fingerprint") != getattr(task, "features_fingerprint", None)
    if states and (states != features_shape(task) or other):
        raise RunError(
            f"--teacher {given.teacher}: it reads the states of an ELMo that is not this run's. Choose a teacher "
            "without, or give its ELMo with --features."
        )
    return load_teacher(
        given.folder,
        task.head,
        tokenizer,
        max_length=task.max_length,
        where=str(config.model),
        dtype=compute_dtype(config.dtype),
        attention_implementation=config.attention,
        **changes,
    )


def imitation(task: Task, outputs: Any, taught: Any, batch: Arrays, temperature: float) -> jax.Array:
    """Sum the divergences of a student's predictions from its teacher's; to be divided by the task's weight.

    Args:
        task: the task.
        outputs: of the student, by `task.forward`.
        taught: of the teacher, on the same batch.
        batch: the batch.
        temperature: T.

    Returns:
        [] float32
    """
    total = jnp.float32(0)
    for own, theirs in zip(task.imitated(outputs, batch), task.imitated(taught, batch), strict=True):
        if own.values:
            apart = jnp.square(own.logits.astype(jnp.float32) - theirs.logits.astype(jnp.float32)).mean(axis=-1)
        else:
            apart = divergence(own.logits, theirs.logits, temperature)
        total += (apart * own.weights).sum()
    return total
