"""The position-wise feed-forward network."""

from functools import partial

import flax.linen as nn
from jax import Array
from jax.nn.initializers import Initializer

from .activations import ACTIVATIONS
from .dropout import Dropout
from .linear import Linear
from .segments import Rows


class FeedForward(nn.Module):
    """A position-wise feed-forward network, activation(x·W₁ + b₁)·W₂ + b₂ (Vaswani et al. 2017, 3.3).

    Gated (Shazeer 2020, 2): (activation(x·V + c) ⊙ (x·W₁ + b₁))·W₂ + b₂, GEGLU with a GELU and SwiGLU with "silu". The
    activation is applied to the gate V.

    Attributes:
        width: the inner width, F.
        activation: a name in `ACTIVATIONS`.
        dropout: dropout rate of the inner activations (not in the paper).
        gated: whether there is a gate.
        use_bias: whether the linear maps have a bias.
        out_init: initialiser of the last map's kernel, W₂; None for `kernel_init`.
        shared_dropout: whether dropout is the same at all positions of a row.
    """

    width: int
    activation: str
    kernel_init: Initializer
    dtype: str = "float32"
    dropout: float = 0.0
    gated: bool = False
    use_bias: bool = True
    out_init: Initializer | None = None
    shared_dropout: bool = False

    @nn.compact
    def __call__(self, hidden: Array, rows: Rows | None = None, *, deterministic: bool = True) -> Array:
        """Transform hidden states [..., E] -> [..., E]; `rows` as for `Dropout`, which only dropout of
        inner activations needs."""
        linear = partial(Linear, dtype=self.dtype, use_bias=self.use_bias)
        widen = partial(linear, (self.width,), ("embed", "mlp"), self.kernel_init)
        out_init = self.kernel_init if self.out_init is None else self.out_init
        activation = ACTIVATIONS[self.activation]
        inner = widen(name="inner")(hidden)
        inner = activation(widen(name="gate")(hidden)) * inner if self.gated else activation(inner)
        if rows is not None:
            inner = Dropout(self.dropout, self.shared_dropout)(inner, rows, deterministic=deterministic)
        return linear((hidden.shape[-1],), ("mlp", "embed"), out_init, name="outer")(inner)
