"""A teacher: a trained model whose outputs a smaller model learns to imitate, and which learns nothing itself.

Its parameters are an argument of the training step, beside the state: they are neither trained nor saved.
"""

from pathlib import Path
from typing import Any, NamedTuple

from ...data import Tokenizer
from .folder import check_head, family_of_folder, load_with_report, read_config
from .tables import CheckpointError


class Teacher(NamedTuple):
    """A teacher's model and parameters."""

    folder: Path
    model: Any
    params: Any  # on the host, or on the devices

    @property
    def config(self) -> Any:
        """Its configuration."""
        return self.model.config


def load_teacher(
    folder: Path, head: str, tokenizer: Tokenizer, *, max_length: int, where: str, **changes: Any
) -> Teacher:
    """Read a teacher's checkpoint folder.

    Args:
        folder: the folder.
        head: head that the student learns from.
        tokenizer: the student's tokenizer, which must be the teacher's too.
        max_length: length of the longest rows that the teacher is to read, in tokens.
        where: folder of the tokenizer, for messages.
        changes: changes of the config, as for `models.load`.

    Raises:
        CheckpointError: the teacher lacks the head, its tensors do not fit, or it has another vocabulary or too few
            positions.
    """
    stored = read_config(folder)
    family = family_of_folder(stored, folder)
    check_head(family, head, folder)
    found, report = load_with_report(folder, head=head, **changes)
    if report.initialised:
        named = stored.get("architectures") or []
        held = dict.fromkeys(known.head for known in family.architectures if known.name in named)
        raise CheckpointError(
            f"the teacher {folder}: expected the head {head}, found {', '.join(held) or 'none that is known'} "
            f"(not in the checkpoint: {', '.join(report.initialised[:3])}{', ...' if report.initialised[3:] else ''})."
        )
    _check_vocabulary(folder, found.tokenizer, found.config.vocab_size, tokenizer, where)
    longest = found.config.max_length
    if longest is not None and max_length > longest:
        raise CheckpointError(
            f"the teacher {folder}: it has {longest} positions, and rows have up to {max_length} tokens."
        )
    return Teacher(folder, found.model, found.params)


def _check_vocabulary(folder: Path, own: Tokenizer | None, rows: int, student: Tokenizer, where: str) -> None:
    """Raise CheckpointError unless the teacher's ids mean what the student's do."""
    if own is None:  # a table may be padded to a multiple of at most 128
        if 0 <= rows - student.vocab_size < 128:
            return
        raise CheckpointError(
            f"the teacher {folder}: it has no tokenizer, and word vectors for a vocabulary of {rows:,}; that of "
            f"{where} has {student.vocab_size:,}."
        )
    theirs, ours = own.tokens, student.tokens
    if theirs == ours:
        return
    place = next((n for n, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours)))
    first, second = (repr(tokens[place]) if place < len(tokens) else "nothing" for tokens in (theirs, ours))
    raise CheckpointError(
        f"the teacher {folder}: another vocabulary than that of {where}: {len(theirs):,} and {len(ours):,} tokens, "
        f"which differ from number {place:,}, {first} and {second}. A teacher and its student need the same."
    )
