"""Stacks of layers: alike, of several kinds, or with shared parameters; scanned or not, with and without remat."""

from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.models.layers.attention import Attention
from bestiary.models.layers.dropout import Dropout
from bestiary.models.layers.feed_forward import FeedForward
from bestiary.models.layers.norms import LayerNorm
from bestiary.models.layers.stack import _parts, run_layers

N, B, L, E = 5, 2, 6, 8
HIDDEN = jax.random.normal(jax.random.key(1), (B, L, E))
SEGMENTS = jnp.array([[1] * 4 + [2] * 2, [1] * 5 + [0]])
ROWS = jnp.arange(B, dtype=jnp.uint32)
GLOBAL: dict[str, Any] = {"window": None, "theta": 160_000.0}
LOCAL: dict[str, Any] = {"window": (1, 1), "theta": 10_000.0}
# As ModernBERT's, with a shorter period: the first layer, which is global, has no norm before its attention.
KINDS = [{**(LOCAL if layer % 2 else GLOBAL), "norm": layer > 0} for layer in range(N)]


class Block(nn.Module):
    """A pre-norm layer, whose window, frequencies and first norm are the caller's to say."""

    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        hidden: jax.Array,
        segment_ids: Any,
        rows: jax.Array,
        *,
        window: Any = None,
        theta: float = 10_000.0,
        norm: bool = True,
        deterministic: bool,
    ) -> jax.Array:
        init = nn.initializers.normal(0.4)
        drop = partial(Dropout(self.dropout), rows=rows, deterministic=deterministic)
        normed = LayerNorm(1e-5, use_bias=False, name="attention_norm")(hidden)
        attention = Attention(E, 2, self.dropout, init, window=window, rotary=theta, name="attention")
        hidden += drop(attention(normed if norm else hidden, segment_ids, rows, deterministic=deterministic))
        normed = LayerNorm(1e-5, use_bias=False, name="feed_forward_norm")(hidden)
        return hidden + drop(FeedForward(12, "gelu", init, gated=True, use_bias=False, name="feed_forward")(normed))


class Stack(nn.Module):
    """N of these layers."""

    kinds: Any = None
    scan: bool = True
    remat: bool = False
    sets: Any = None
    dropout: float = 0.0

    def setup(self) -> None:
        self.layers = Block(self.dropout)

    def __call__(self, hidden: jax.Array, *, deterministic: bool = True, **more: Any) -> Any:
        settings = dict(scan=self.scan, remat=self.remat, sets=self.sets, kinds=self.kinds)
        return run_layers(self.layers, hidden, SEGMENTS, ROWS, count=N, deterministic=deterministic, **settings, **more)


def drawn(stack: Stack) -> Any:
    """Parameters at random, without a program that draws them."""
    random = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        return np.float32(random.normal(size=leaf.shape) * 0.4 + (path[-1].key == "scale"))

    shapes = nn.unbox(jax.eval_shape(stack.init, jax.random.key(0), HIDDEN))["params"]
    return jax.tree.map_with_path(draw, shapes)


def by_hand(params: Any, kinds: Any) -> list[jax.Array]:
    outputs = [HIDDEN]
    for layer, kind in enumerate(kinds):
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"])
        given: Any = Block().apply({"params": own}, outputs[-1], SEGMENTS, ROWS, **kind, deterministic=True)
        outputs.append(given)
    return outputs[1:]


def total(params: Any, run: Any) -> Any:
    outputs = run(params)
    return jnp.sin(outputs[-1]).sum() + jnp.cos(outputs[2]).sum(), outputs


@cache
def one_by_one(*, alike: bool) -> Any:
    """From parameters of each layer to ((total, outputs), gradients)."""

    def run(params: Any) -> Any:
        return jnp.stack(by_hand(params, ({},) * N if alike else KINDS))

    return jax.jit(jax.value_and_grad(partial(total, run=run), has_aux=True))


def expected_of(params: Any, sets: Any, *, alike: bool) -> Any:
    """((total, outputs), gradients) of the layers one by one; a set's gradient is the sum over its layers."""
    if sets is None:
        return one_by_one(alike=alike)(params)
    found, gradients = one_by_one(alike=alike)(jax.tree.map(lambda leaf: leaf[list(sets)], params))

    def summed(gradient: Any, leaf: np.ndarray) -> np.ndarray:
        sums = np.zeros_like(leaf)
        np.add.at(sums, list(sets), np.asarray(gradient))
        return sums

    return found, jax.tree.map(summed, gradients, params)


def compared(stack: Stack) -> None:
    """Outputs and gradients, the latter finite, with those of the layers one by one."""
    params = drawn(stack)

    def run(params: Any) -> Any:
        given: Any = stack.apply({"params": params}, HIDDEN, every_layer=True)
        last, every = given
        assert last.shape == every.shape[1:]
        return every

    (_, found), gradients = jax.jit(jax.value_and_grad(partial(total, run=run), has_aux=True))(params)
    (_, wanted), expected_gradients = expected_of(params, stack.sets, alike=stack.kinds is None)
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-3), gradients, expected_gradients)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize(("scan", "remat"), [(True, True), (True, False), (False, True)])
def test_layers_of_several_kinds_are_applied_in_turn(scan: bool, remat: bool) -> None:
    compared(Stack(KINDS, scan, remat))


@pytest.mark.parametrize(
    ("sets", "scan", "remat"),
    [
        ((0,) * N, True, False),
        ((0, 0, 0, 1, 1), True, True),
        ((0, 1, 0, 1, 0), True, False),
        ((0, 0, 1, 1, 1), False, False),
    ],
)
def test_layers_share_sets_of_parameters(sets: tuple[int, ...], scan: bool, remat: bool) -> None:
    """A set's gradient is the sum over the layers that use it."""
    stack = Stack(None, scan, remat, sets)
    assert drawn(stack)["layers"]["attention"]["query"]["kernel"].shape == (max(sets) + 1, E, 2, 4)
    compared(stack)


def test_kinds_change_no_parameter() -> None:
    """They are drawn as of layers that are alike, each carrying the axis of the layers."""
    plain, boxed = (jax.jit(Stack(kinds).init)(jax.random.key(0), HIDDEN)["params"] for kinds in (None, KINDS))
    jax.tree.map(np.testing.assert_array_equal, nn.unbox(boxed), nn.unbox(plain))
    assert boxed["layers"]["attention"]["query"]["kernel"].names == ("layers", "embed", "heads", "head_dim")


def test_the_last_layer_of_another_kind_computes_some_positions_alone() -> None:
    kinds = [*[LOCAL] * (N - 1), GLOBAL]
    stack = Stack(kinds)
    params, positions = drawn(stack), jnp.array([[0, 4], [0, 0]])
    run = jax.jit(lambda **more: stack.apply({"params": params}, HIDDEN, **more)[0])
    found, whole = run(last_positions=positions), run()
    np.testing.assert_allclose(found, jnp.take_along_axis(whole, positions[..., None], axis=1), atol=1e-5)
    with pytest.raises(NotImplementedError, match="query_positions with causal, window or bias"):
        jax.eval_shape(partial(Stack([LOCAL] * N).apply, last_positions=positions), {"params": params}, HIDDEN)


@pytest.mark.parametrize("form", [{"kinds": KINDS}, {"sets": (0, 0, 0, 1, 1)}])
def test_each_layer_drops_its_own(form: Any) -> None:
    """Scanned or written out, a layer's dropout is the same, and no other layer's."""
    params = drawn(Stack(**form))
    calm = jax.tree.map(jnp.zeros_like, params)

    def runner(**changes: Any) -> Any:
        stack = Stack(**{**form, "dropout": 0.5, **changes})

        def run(params: Any, key: int = 0) -> Any:
            rngs = {"dropout": jax.random.key(key)}
            return stack.apply({"params": params}, HIDDEN, deterministic=False, every_layer=True, rngs=rngs)[1]

        return jax.jit(run)

    run = runner()
    np.testing.assert_allclose(run(params), runner(scan=False)(params), atol=1e-4, rtol=1e-5)
    assert np.abs(run(params) - run(params, 1)).max() > 1e-2
    np.testing.assert_array_equal(run(calm)[-1], HIDDEN)
    # What a layer adds where only the output's bias is there: the dropout mask itself.
    calm["layers"]["attention"]["out"]["bias"] += 1.0
    every = jnp.concatenate([HIDDEN[None], run(calm)])
    masks = (np.diff(every, axis=0) > 0.5).reshape(N, -1)
    assert len({mask.tobytes() for mask in masks}) == N


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ValueError, match="expected 5 kinds, one for each layer, found 2"):
        Stack(KINDS[:2]).init(jax.random.key(0), HIDDEN)
    with pytest.raises(ValueError, match="expected 5 sets, one for each layer, found 2"):
        Stack(sets=(0, 0)).init(jax.random.key(0), HIDDEN)


@pytest.mark.parametrize(
    ("layers", "parts"),
    [
        ("aaaa", [(0, 1, 4)]),
        ("abab", [(0, 2, 2)]),
        # The first layer, three rounds of (local, local, global), two local ones.
        ("fllgllgllgll", [(0, 1, 1), (1, 3, 3), (10, 1, 2)]),
        ("abcd", [(0, 1, 1), (1, 1, 1), (2, 1, 1), (3, 1, 1)]),
        ("aaab", [(0, 1, 3), (3, 1, 1)]),
        ("aabb", [(0, 1, 2), (2, 1, 2)]),
        ("a", [(0, 1, 1)]),
        ("", []),
    ],
)
def test_scans_go_over_periods(layers: str, parts: list[tuple[int, int, int]]) -> None:
    assert _parts(layers) == parts
