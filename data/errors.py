"""Errors about a user's data; each message says where the problem is, what was expected, and what to do."""

from __future__ import annotations


class DataError(ValueError):
    """Raised for text, vocabularies and caches that cannot be used as they are.

    The message is meant for the user: file and line, what was expected, what was found, and a remedy.
    """


class CorpusError(DataError):
    """Raised for a corpus that cannot be read: missing, empty, or in another encoding or format."""
