"""Errors for the user; the command line prints their message without a traceback."""


class RunError(ValueError):
    """Raised if a run cannot start or continue as asked."""
