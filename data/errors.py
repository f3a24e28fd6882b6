"""What this package raises about a user's data: one message that says where, what was expected, and what to do."""

from __future__ import annotations


class DataError(ValueError):
    """Text, vocabulary or cache that cannot be used as it is.

    The message is meant for the user, whole: file and line, what was expected and found there, and a way out.
    """


class CorpusError(DataError):
    """A corpus that cannot be read as it lies there: missing, empty, in another encoding or format."""
