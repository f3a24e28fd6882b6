"""Errors whose message is all that a user needs; the command line prints them without a traceback."""


class RunError(ValueError):
    """A run cannot start or go on as asked."""
