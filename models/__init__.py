"""Models, one file per family, and checkpoint folders in the released format.

    from bestiary import models
    model, params, config, tokenizer = models.load("folder")

Importing this package imports nothing heavy; JAX comes with the first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints.folder import Loaded, load, save

__all__ = ["Loaded", "load", "save"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .checkpoints import folder

    return getattr(folder, name)
