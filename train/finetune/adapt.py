"""Fine-tuning a few parameters: LoRA's adapters (Hu et al. 2021), or biases alone (BitFit, Ben Zaken et al. 2021).

Either way what lies outside of the embeddings and layers trains whole, poolers and heads: it may have been drawn anew.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import flax.linen as nn
import jax

from ...models.checkpoints.tables import Params, flatten
from ...models.lora import LoraConfig, Target, adapted, add_lora, is_lora, lora_targets, merge_lora
from ...models.peft import save_lora
from ...models.registry import family_of_model
from ..errors import RunError
from .config import AdaptConfig

Names = tuple[str, ...]  # along the way to a parameter


class Adaptation(Protocol):
    """How a run adapts a model."""

    def extend(self, params: Params, key: jax.Array) -> Any:
        """The tree to train, from the model's own; boxed if that is."""
        ...

    def trains(self, names: Names) -> bool:
        """Whether the parameter at the end of this way trains."""
        ...

    def active(self) -> AbstractContextManager[None]:
        """To be entered around every `model.apply` with the extended tree, where it is traced."""
        ...

    def merged(self, params: Params) -> Any:
        """The plain model's tree, on the host."""
        ...

    def save(self, folder: Path, model: nn.Module, params: Params, base: str) -> None:
        """Write what was trained alone, if it has a format of its own. `base` is the folder of the model adapted."""
        ...


class AdaptedModel:
    """A model whose parameters are the extended tree: what a train loop needs of a flax module."""

    def __init__(self, model: nn.Module, adaptation: Adaptation):
        self.plain, self._adaptation = model, adaptation
        self.config: Any = model.config  # type: ignore[attr-defined]

    def init(self, key: jax.Array, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """New parameters, in boxes."""
        params = self.plain.init(key, *args, **kwargs)["params"]
        return {"params": self._adaptation.extend(params, jax.random.fold_in(key, 1))}

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """The plain model's `apply`, adapted."""
        with self._adaptation.active():
            return self.plain.apply(*args, **kwargs)


def adaptation(config: AdaptConfig, model: nn.Module, params: Params) -> Adaptation | None:
    """The adaptation that the configuration asks for, or None where all of the model trains.

    Args:
        config: from the command line.
        model: of a family of this package.
        params: its parameters, or their shapes.

    Raises:
        LoraError: a target that is no linear map of the model. RunError: biases are to be trained, and there are none.
    """
    if config.lora_rank:
        return _Lora(model, config.lora(), lora_targets(model, config.lora_targets))
    if config.bitfit:
        return _BitFit(model, params)
    return None


class _Lora:
    def __init__(self, model: nn.Module, config: LoraConfig, targets: list[Target]):
        self._config, self._targets = config, targets
        self._in_layers = family_of_model(model)[0].is_encoder_parameter

    def extend(self, params: Params, key: jax.Array) -> Any:
        return add_lora(params, self._targets, self._config, key)

    def trains(self, names: Names) -> bool:
        return is_lora(names) or not self._in_layers(names)

    def active(self) -> AbstractContextManager[None]:
        return adapted(self._config)

    def merged(self, params: Params) -> Any:
        return merge_lora(params, self._config)[0]

    def save(self, folder: Path, model: nn.Module, params: Params, base: str) -> None:
        save_lora(folder, model, params, self._config, base=base)


class _BitFit:
    def __init__(self, model: nn.Module, params: Params):
        self._in_layers = family_of_model(model)[0].is_encoder_parameter
        if not any(path[-1] == "bias" and self._in_layers(path) for path, _ in flatten(params)):
            raise RunError(f"--bitfit: a {type(model).__name__} has no biases to train. Use --lora-rank.")

    def extend(self, params: Params, key: jax.Array) -> Any:
        del key
        return params

    def trains(self, names: Names) -> bool:
        return names[-1] == "bias" or not self._in_layers(names)

    def active(self) -> AbstractContextManager[None]:
        return nullcontext()

    def merged(self, params: Params) -> Any:
        return params

    def save(self, folder: Path, model: nn.Module, params: Params, base: str) -> None:
        del folder, model, params, base
