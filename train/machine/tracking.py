"""Metrics for wandb or trackio too: an optional hook, which sends nothing over the network unless the user says so."""

import os
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from ..errors import RunError

Tracker = Literal["wandb", "trackio"]


def require_tracker(name: Tracker | None) -> None:
    """Raise RunError if a tracker is asked for that is not installed."""
    if name is not None and find_spec(name) is None:
        raise RunError(
            f"--track {name}: {name} is not installed. Install it (pip install {name}), or leave --track out."
        )


class Tracking:
    """A run at a tracker, offline: wandb writes to the run's folder (WANDB_MODE says otherwise), trackio to its own.

    Args:
        name: the tracker, which must be installed.
        folder: the run's folder.
        settings: the run's configuration.
    """

    def __init__(self, name: Tracker, folder: Path, settings: Mapping[str, Any]):
        self._tracker: Any = import_module(name)
        more: dict[str, Any] = {}
        if name == "wandb":
            more = {"dir": str(folder), "mode": os.environ.get("WANDB_MODE", "offline")}
        self._tracker.init(project="bestiary", name=folder.name, config=dict(settings), **more)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record metrics of a step."""
        self._tracker.log(dict(values), step=step)

    def close(self) -> None:
        """End the tracker's run."""
        self._tracker.finish()
