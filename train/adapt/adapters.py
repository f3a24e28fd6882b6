"""Parameter-efficient fine-tuning: LoRA (Hu et al. 2021), or only the biases (BitFit, Ben Zaken et al. 2021).

In both cases poolers and heads, which may be newly initialised, are trained fully.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import flax.linen as nn
import jax

from ...models.checkpoints.peft import save_lora
from ...models.checkpoints.tables import Params, flatten
from ...models.lora import LORA_SCALE, LoraConfig, Target, adapted, add_lora, is_lora, lora_targets, merge_lora
from ...models.registry import family_of_model
from ..config import AdaptConfig
from ..errors import RunError

Names = tuple[str, ...]  # along the way to a parameter


class Adaptation(Protocol):
    """A way of adapting a model."""

    def extend(self, params: Params, key: jax.Array) -> Any:
        """Return the tree to train, made from the model's own; boxed if that is boxed."""
        ...

    def trains(self, names: Names) -> bool:
        """Tell whether the parameter with this path is trained."""
        ...

    def active(self) -> AbstractContextManager[None]:
        """Return the context in which to trace every `model.apply` with the extended tree."""
        ...

    def merged(self, params: Params) -> Any:
        """Return the tree of the plain model, on the host."""
        ...

    def save(self, folder: Path, model: nn.Module, params: Params, base: str) -> None:
        """Save the trained parameters alone, if they have a format. `base` is the folder of the adapted model."""
        ...


class AdaptedModel:
    """A model whose parameters are the extended tree, with the interface of a Flax module that training needs."""

    def __init__(self, model: nn.Module, adaptation: Adaptation):
        self.plain, self._adaptation = model, adaptation
        self.config: Any = model.config  # type: ignore[attr-defined]

    def init(self, key: jax.Array, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Initialise parameters, boxed."""
        params = self.plain.init(key, *args, **kwargs)["params"]
        return {"params": self._adaptation.extend(params, jax.random.fold_in(key, 1))}

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Run the plain model's `apply`, adapted."""
        with self._adaptation.active():
            return self.plain.apply(*args, **kwargs)


def adaptation(config: AdaptConfig, model: nn.Module, params: Params) -> Adaptation | None:
    """Return the adaptation that the configuration asks for, or None if the whole model is trained.

    Args:
        config: options from the command line.
        model: a model of this package.
        params: its parameters, or their shapes.

    Raises:
        LoraError: a target is not a linear layer of the model.
        RunError: the model has no biases to train.
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
        return is_lora(names) or (names[-1] != LORA_SCALE and not self._in_layers(names))

    def active(self) -> AbstractContextManager[None]:
        return adapted(self._config)

    def merged(self, params: Params) -> Any:
        return merge_lora(params, self._config)[0]

    def save(self, folder: Path, model: nn.Module, params: Params, base: str) -> None:
        save_lora(folder, model, params, self._config, base=base)


class _BitFit:
    def __init__(self, model: nn.Module, params: Params):
        family, _ = family_of_model(model)
        self._in_layers = family.is_encoder_parameter
        if not any(path[-1] == "bias" and self._in_layers(path) for path, _ in flatten(params)):
            raise RunError(f"--bitfit: the layers of {family.title} have no biases to train. Use --lora-rank.")

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
