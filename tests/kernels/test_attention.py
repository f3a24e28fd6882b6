"""The conformance suite: what every backend of `attention` must do.

A backend joins by one line in `BACKENDS`. It is compared with a float64 reference in NumPy, which is itself compared
with finite differences.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bestiary.kernels import AlibiBias, DenseBias, RelativeBias, attention, row_seeds
from bestiary.kernels.bias import bucket_edges
from bestiary.kernels.hash import keep, key_words, query_words
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

SEED = jnp.array([12, 3456], jnp.uint32)


@dataclasses.dataclass(frozen=True)
class Backend:
    """How a backend is run here."""

    name: str
    context: Callable[[], AbstractContextManager] = contextlib.nullcontext
    """What its calls are traced and run under: an interpreter, where the chip is missing."""


BACKENDS = [
    Backend("xla"),
]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: sizes and options. `bias` is a kind, its arrays are drawn; `segments` is how segment ids are drawn."""

    name: str
    sizes: tuple[int, int, int, int, int, int, int] = (2, 17, 17, 4, 4, 8, 8)
    """B, L, S, H, K, D, Dv."""
    bias: str | None = None
    bias_shape: tuple[int, int] = (1, 1)
    segments: str | None = None
    rate: float = 0.0
    options: dict = dataclasses.field(default_factory=dict)


CROSS = (2, 19, 33, 4, 4, 8, 12)
GROUPED = (2, 21, 21, 6, 2, 16, 8)
CASES = [
    Case("plain"),
    Case("cross, odd lengths, other value size, scale", CROSS, options={"scale": 1.0}),
    Case("causal, fewer queries", (1, 9, 14, 2, 2, 8, 8), options={"causal": True}),
    Case("causal, fewer keys", (1, 14, 9, 2, 2, 8, 8), options={"causal": True}),
    Case("window", options={"window": (3, 5)}),
    Case("window that leaves late queries nothing", (1, 23, 9, 2, 2, 8, 8), options={"window": (2, None)}),
    Case("packed, dropout", segments="packed", rate=0.2),
    Case("segments in any order, grouped heads, dropout", GROUPED, segments="any", rate=0.3),
    Case("cross, segments, alibi", CROSS, bias="alibi", segments="any"),
    Case("softcap, dense bias shared by rows", CROSS, bias="dense", bias_shape=(1, 4), options={"softcap": 2.0}),
    Case("dense bias shared by heads, packed", bias="dense", bias_shape=(2, 1), segments="packed"),
    Case("dense bias of each row and head, grouped", GROUPED, bias="dense", bias_shape=(2, 6), rate=0.1),
    Case("relative, packed, dropout", bias="relative", segments="packed", rate=0.2, options={"scale": 1.0}),
    Case("relative, causal, cross", CROSS, bias="relative causal", options={"causal": True, "scale": 1.0}),
    Case("alibi, causal, window, one key head", (2, 18, 18, 4, 1, 8, 8), bias="alibi",
         options={"causal": True, "window": (6, None)}),
    Case("all together", (3, 27, 35, 4, 2, 8, 12), bias="relative", segments="any", rate=0.15,
         options={"window": (13, 17), "softcap": 3.0, "scale": 0.7}),
]  # fmt: skip

BIASES = {
    "dense": DenseBias,
    "relative": functools.partial(RelativeBias, bidirectional=True, max_distance=20),
    "relative causal": functools.partial(RelativeBias, bidirectional=False, max_distance=20),
    "alibi": AlibiBias,
}
BUCKETS = 8


def draw_segments(kind: str, generator: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """int32 [rows, length]. "any": in no order, a tenth padding. "packed": ascending, padding last, and a row of it."""
    if kind == "any":
        ids = generator.integers(1, 4, (rows, length))
        ids[generator.random((rows, length)) < 0.1] = 0
        return ids.astype(np.int32)
    ids = np.sort(generator.integers(1, 5, (rows, length)), axis=1)
    ids[:, length - 3 :] = 0
    ids[-1] = 0
    return ids.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A case's arrays: what is differentiated, the cotangents, and the rest."""

    primals: tuple[np.ndarray, ...]
    """query, key, value and, where there is one, the bias's array."""
    cotangents: tuple[np.ndarray, np.ndarray]
    query_ids: np.ndarray | None
    key_ids: np.ndarray | None


def draw(case: Case, dtype: str = "float32") -> Drawn:
    b, q_len, k_len, heads, k_heads, size, v_size = case.sizes
    generator = np.random.default_rng(sum(map(ord, case.name)))

    def normal(*shape: int) -> np.ndarray:
        return np.asarray(jnp.asarray(generator.normal(size=shape), dtype))

    shapes = {
        "dense": (*case.bias_shape, q_len, k_len),
        "relative": (BUCKETS, heads),
        "relative causal": (BUCKETS, heads),
        "alibi": (heads,),
    }
    primals = [normal(b, q_len, heads, size), normal(b, k_len, k_heads, size), normal(b, k_len, k_heads, v_size)]
    if case.bias is not None:
        primals.append(normal(*shapes[case.bias]).astype("float64" if dtype == "float64" else "float32"))
    ids = [None, None]
    if case.segments is not None:
        ids = [draw_segments(case.segments, generator, b, length) for length in (q_len, k_len)]
        if q_len == k_len:
            ids[1] = ids[0]
    cotangents = normal(b, q_len, heads, v_size), generator.normal(size=(b, q_len, heads)).astype(np.float32)
    return Drawn(tuple(primals), cotangents, *ids)


def call(case: Case, drawn: Drawn, implementation: str | None = None, seed: jax.Array = SEED) -> Callable:
    """The case as a function of its primals, returning (output, lse)."""

    def function(query, key, value, *bias):
        return attention(
            query,
            key,
            value,
            bias=BIASES[case.bias](*bias) if case.bias else None,
            query_segment_ids=drawn.query_ids,
            key_segment_ids=drawn.key_ids,
            dropout_rate=case.rate,
            dropout_seed=seed,
            return_lse=True,
            implementation=implementation,
            **case.options,
        )

    return function


def with_gradients(function: Callable) -> Callable:
    """(primals, cotangents) -> (output, lse, *gradients), compiled."""

    def run(primals, cotangents):
        outputs, pull = jax.vjp(function, *primals)
        return (*outputs, *pull(tuple(c.astype(x.dtype) for c, x in zip(cotangents, outputs, strict=True))))

    return jax.jit(run)


def mask_of(case: Case, drawn: Drawn) -> np.ndarray:
    """bool [B, 1, L, S], from the words of the contract."""
    b, q_len, k_len = case.sizes[:3]
    i, j = np.arange(q_len)[:, None], np.arange(k_len)[None, :]
    left, right = case.options.get("window", (None, None))
    mask = np.ones((b, 1, q_len, k_len), bool)
    if case.options.get("causal"):
        mask &= j <= i
    if left is not None:
        mask &= j >= i - left
    if right is not None:
        mask &= j <= i + right
    if drawn.query_ids is not None:
        mask &= drawn.query_ids[:, None, :, None] == drawn.key_ids[:, None, None, :]
        mask &= drawn.query_ids[:, None, :, None] != 0
    return mask  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def kept_of(rate: float, rows: int, heads: int, queries: int, keys: int) -> jax.Array:
    """Dropout's bits [B, H, L, S], from the hash (which test_hash.py writes out in NumPy)."""
    a, b = query_words(row_seeds(SEED, jnp.arange(rows)), jnp.arange(heads), jnp.arange(queries))
    g = key_words(jnp.arange(keys))
    return keep(a[..., None], b[..., None], g[None, None, None, :], rate)


def reference(case: Case, drawn: Drawn) -> tuple[np.ndarray, ...]:
    """(output, lse, *gradients) in float64: the formula, and its derivative by hand."""
    q, k, v, *bias = (x.astype(np.float64) for x in drawn.primals)
    d_out, d_lse = (x.astype(np.float64) for x in drawn.cotangents)
    b, q_len, k_len, heads, k_heads, size, _ = case.sizes
    group = heads // k_heads
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scale, softcap = case.options.get("scale", size**-0.5), case.options.get("softcap")

    scores = scale * np.einsum("blhd,bshd->bhls", q, k)
    distance = np.arange(k_len)[None, :] - np.arange(q_len)[:, None]
    bucket = np.zeros((0,))
    if case.bias == "dense":
        scores = scores + bias[0]
    elif case.bias == "alibi":
        scores = scores - bias[0][:, None, None] * np.abs(distance)
    elif case.bias is not None:
        both = case.bias == "relative"
        edges = bucket_edges(bidirectional=both, buckets=BUCKETS, max_distance=20)
        reach = np.abs(distance) if both else np.maximum(-distance, 0)
        bucket = np.searchsorted(edges, reach, side="right") + (distance > 0) * both * (BUCKETS // 2)
        scores = scores + np.moveaxis(bias[0][bucket], -1, 0)
    slope = 1.0
    if softcap is not None:
        slope = 1 - np.tanh(scores / softcap) ** 2
        scores = softcap * np.tanh(scores / softcap)

    mask = mask_of(case, drawn)
    empty = ~np.broadcast_to(mask.any(-1), (b, heads, q_len))
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = np.where(mask, np.exp(scores - scores.max(-1, keepdims=True)), 0)
        lse = np.log(weights.sum(-1)) + scores.max(-1)
        weights = np.where(empty[..., None], 0, weights / weights.sum(-1, keepdims=True))
    factor = np.ones(())
    if case.rate:
        factor = np.asarray(kept_of(case.rate, b, heads, q_len, k_len)) / (1 - case.rate)
    out = np.einsum("bhls,bshd->blhd", weights * factor, v)

    d_weights = np.einsum("blhd,bshd->bhls", d_out, v) * factor
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
    d_scores = (d_scores + weights * np.where(empty, 0, np.moveaxis(d_lse, 1, 2))[..., None]) * slope
    gradients = [
        np.einsum("bhls,bshd->blhd", d_scores, k) * scale,
        np.einsum("bhls,blhd->bshd", d_scores, q) * scale,
        np.einsum("bhls,blhd->bshd", weights * factor, d_out),
    ]
    gradients[1:] = [x.reshape(b, k_len, k_heads, group, -1).sum(3) for x in gradients[1:]]
    if case.bias == "dense":
        shared = tuple(axis for axis in (0, 1) if bias[0].shape[axis] == 1)
        gradients.append(d_scores.sum(shared, keepdims=True))
    elif case.bias == "alibi":
        gradients.append(-(d_scores * np.abs(distance)).sum((0, 2, 3)))
    elif case.bias is not None:
        gradients.append(np.stack([d_scores[:, :, bucket == n].sum((0, 2)) for n in range(BUCKETS)]))
    return out, np.moveaxis(lse, 1, 2), *gradients


def error(found, expected: np.ndarray) -> float:
    """The norm of the difference as a share of the norm expected; infinities must be the same."""
    found = np.asarray(found, np.float64)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(found[~finite], expected[~finite])
    return float(np.linalg.norm(found[finite] - expected[finite]) / max(np.linalg.norm(expected[finite]), 1e-30))


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.name)
def backend(request):
    with request.param.context():
        yield request.param


def everything() -> Case:
    return CASES[-1]


def names(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", CASES, ids=names)
def test_outputs_and_gradients(backend, case):
    drawn = draw(case)
    found = with_gradients(call(case, drawn, backend.name))(drawn.primals, drawn.cotangents)
    labels = ("output", "lse", "query", "key", "value", "bias")
    for label, ours, expected in zip(labels, found, reference(case, drawn), strict=False):
        assert ours.shape == expected.shape, label
        assert error(ours, expected) < 2e-6, label


@pytest.mark.parametrize("case", [CASES[0], CASES[6], everything()], ids=names)
def test_bfloat16(backend, case):
    drawn = draw(case, "bfloat16")
    found = with_gradients(call(case, drawn, backend.name))(drawn.primals, drawn.cotangents)
    assert [str(x.dtype) for x in found[:5]] == ["bfloat16", "float32", "bfloat16", "bfloat16", "bfloat16"]
    for ours, expected in zip(found, reference(case, drawn), strict=True):
        # bfloat16 rounds by up to 2**-9; weights, score gradients and the result are rounded once each.
        assert error(ours, expected) < 2**-7


def test_empty_rows_are_zero_and_send_no_gradient(backend):
    case = CASES[6]
    drawn = draw(case)
    empty = ~mask_of(case, drawn).any((1, 3))
    assert empty[-1].all()
    assert empty.any(1).all()
    # What a loss makes of lse = -inf may itself be infinite or not a number.
    cotangents = drawn.cotangents[0], np.where(empty[:, :, None], np.nan, drawn.cotangents[1])
    out, lse, d_query, d_key, d_value = with_gradients(call(case, drawn, backend.name))(drawn.primals, cotangents)
    np.testing.assert_array_equal(np.asarray(out)[empty], 0)
    np.testing.assert_array_equal(np.asarray(lse)[empty], -np.inf)
    np.testing.assert_array_equal(np.asarray(d_query)[empty], 0)
    for gradient in (d_query, d_key, d_value):
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(np.asarray(gradient)[-1], 0)


@pytest.mark.parametrize("case", [CASES[7], everything()], ids=names)
def test_what_is_not_attended_to_changes_nothing(backend, case):
    drawn = draw(case)
    query, key, value, *bias = drawn.primals
    # Segment 2's keys and the padding's, seen by segment 2's queries alone, which get no cotangent.
    strange = (drawn.key_ids == 2) | (drawn.key_ids == 0)
    others = drawn.query_ids != 2
    cotangents = [np.where(others[(...,) + (None,) * (x.ndim - 2)], x, 0) for x in drawn.cotangents]
    planted = np.where(strange[..., None, None], np.float32(1e30), key)
    shouted = np.where(strange[..., None, None], np.float32(3e38), value)
    run = with_gradients(call(case, drawn, backend.name))
    before = run(drawn.primals, cotangents)
    after = run((query, planted, shouted, *bias), cotangents)
    for label, x, y in zip(("output", "lse", "query"), before, after, strict=False):
        np.testing.assert_array_equal(np.asarray(x)[others], np.asarray(y)[others], err_msg=label)
    for label, x, y in zip(("key", "value"), before[3:], after[3:], strict=False):
        np.testing.assert_array_equal(np.asarray(x)[~strange], np.asarray(y)[~strange], err_msg=label)


def test_packed_equals_each_example_alone(backend):
    case = Case("packed", (1, 24, 24, 2, 2, 8, 8), bias="relative", options={"window": (7, 9)})
    lengths = (9, 4, 8)
    drawn = draw(case)
    ids = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)] + [np.zeros(3)])[None].astype(np.int32)
    packed = with_gradients(call(case, dataclasses.replace(drawn, query_ids=ids, key_ids=ids), backend.name))(
        drawn.primals, drawn.cotangents
    )
    table = np.zeros_like(drawn.primals[3])
    start = 0
    for n in lengths:
        part = slice(start, start + n)
        alone = with_gradients(call(case, drawn, backend.name))(
            (*(x[:, part] for x in drawn.primals[:3]), drawn.primals[3]), [x[:, part] for x in drawn.cotangents]
        )
        for x, y in zip(packed[:5], alone[:5], strict=True):
            np.testing.assert_allclose(x[:, part], y, rtol=1e-5, atol=1e-6)
        table += alone[5]
        start += n
    np.testing.assert_allclose(packed[5], table, rtol=1e-5, atol=1e-5)


def test_dropout_bits(backend):
    """With equal scores and the identity as value, the output is the bits."""
    b, q_len, k_len, heads, rate = 3, 5, 40, 2, 0.25
    value = np.broadcast_to(np.eye(k_len, dtype=np.float32)[None, :, None, :], (b, k_len, heads, k_len))
    query, key = np.zeros((b, q_len, heads, 8), np.float32), np.zeros((b, k_len, heads, 8), np.float32)

    dropped = jax.jit(functools.partial(attention, dropout_rate=rate, implementation=backend.name))

    def bits(rows: slice, seed) -> np.ndarray:
        out = dropped(query[rows], key[rows], value[rows], dropout_seed=seed)
        return np.moveaxis(np.asarray(out) * k_len, 1, 2)

    expected = np.asarray(kept_of(rate, b, heads, q_len, k_len)) / (1 - rate)
    np.testing.assert_allclose(bits(slice(None), SEED), expected, rtol=1e-6)
    # A seed for each row is the same, and the rows keep their bits when the batch is split.
    seeds = np.asarray(jax.jit(row_seeds)(SEED, np.arange(b)))
    np.testing.assert_allclose(bits(slice(None), seeds), expected, rtol=1e-6)
    np.testing.assert_allclose(bits(slice(1, 3), seeds[1:]), expected[1:], rtol=1e-6)


def test_runs_are_bit_equal(backend):
    case = everything()
    drawn = draw(case)
    run = with_gradients(call(case, drawn, backend.name))
    first, second = run(drawn.primals, drawn.cotangents), run(drawn.primals, drawn.cotangents)
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)


def test_split_over_a_mesh_gathers_nothing(backend):
    case = Case("mesh", (8, 16, 16, 4, 2, 8, 8), bias="relative", segments="packed", rate=0.1)
    drawn = draw(case)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"))
    heads, table = NamedSharding(mesh, P("data", None, "tensor", None)), NamedSharding(mesh, P(None, "tensor"))
    primals = [jax.device_put(x, s) for x, s in zip(drawn.primals, [heads] * 3 + [table], strict=True)]
    cotangents = [
        jax.device_put(drawn.cotangents[0], heads),
        jax.device_put(drawn.cotangents[1], heads.update(spec=P("data", None, "tensor"))),
    ]
    rows = NamedSharding(mesh, P("data", None))

    def run(primals, cotangents, ids, seed):
        split = dataclasses.replace(drawn, query_ids=ids, key_ids=ids)
        return with_gradients(call(case, split, backend.name, seed))(primals, cotangents)

    compiled = (
        jax.jit(run, out_shardings=(heads, None, heads, heads, heads, table))
        .lower(primals, cotangents, jax.device_put(drawn.query_ids, rows), SEED)
        .compile()
    )
    assert "all-gather" not in compiled.as_text()
    found = compiled(primals, cotangents, jax.device_put(drawn.query_ids, rows), SEED)
    for ours, expected in zip(found, reference(case, drawn), strict=True):
        assert error(ours, expected) < 2e-6


def test_reference_gradients_against_finite_differences():
    case = everything()
    drawn = draw(case, "float32")
    drawn = dataclasses.replace(drawn, primals=tuple(x.astype(np.float64) for x in drawn.primals))
    gradients = reference(case, drawn)[2:]
    generator = np.random.default_rng(0)

    def loss(primals) -> float:
        out, lse, *_ = reference(case, dataclasses.replace(drawn, primals=tuple(primals)))
        terms = (out * drawn.cotangents[0]).sum(), np.where(np.isfinite(lse), lse, 0) * drawn.cotangents[1]
        return float(terms[0] + terms[1].sum())

    for place, gradient in enumerate(gradients):
        direction = generator.normal(size=gradient.shape)
        step = 1e-6
        moved = [[x + sign * step * direction * (n == place) if n == place else x for n, x in enumerate(drawn.primals)]
                 for sign in (1, -1)]  # fmt: skip
        slope = (loss(moved[0]) - loss(moved[1])) / (2 * step)
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-6)


class TestXla:
    """What is the reference backend's own."""

    def test_float64_is_exact(self):
        case = everything()
        with jax.enable_x64(True):
            drawn = draw(case, "float64")
            found = with_gradients(call(case, drawn, "xla"))(drawn.primals, drawn.cotangents)
        for ours, expected in zip(found, reference(case, drawn), strict=True):
            assert ours.dtype == jnp.float64
            assert error(ours, expected) < 1e-12

    @pytest.mark.parametrize("case", [CASES[9], everything()], ids=names)
    def test_blocks_of_queries_change_nothing(self, monkeypatch, case):
        drawn = draw(case)
        q_len, k_len = case.sizes[1:3]
        monkeypatch.setattr(sys.modules["bestiary.kernels.xla"], "BLOCK_SCORES", q_len * k_len // 3)
        found = with_gradients(call(case, drawn, "xla"))(drawn.primals, drawn.cotangents)
        for ours, expected in zip(found, reference(case, drawn), strict=True):
            assert error(ours, expected) < 2e-6

    def test_nothing_of_the_scores_size_is_kept_for_the_backward_pass(self):
        case = Case("long", (1, 64, 64, 2, 2, 8, 8), segments="packed", rate=0.1)
        drawn = draw(case)
        pull = jax.eval_shape(lambda *primals: jax.vjp(call(case, drawn, "xla"), *primals)[1], *drawn.primals)
        kept = [x.size for x in jax.tree.leaves(pull)]
        assert kept
        assert max(kept) < 64 * 64

    def test_mask_of_minus_infinity_in_a_dense_bias(self):
        case = Case("masking bias", bias="dense", bias_shape=(2, 1))
        drawn = draw(case)
        bias = np.where(np.arange(17) < 9, drawn.primals[3], np.float32(-np.inf))
        bias[0, 0, 3] = -np.inf
        drawn.cotangents[1][0, 3] = np.nan
        out, lse, *gradients = with_gradients(call(case, drawn, "xla"))((*drawn.primals[:3], bias), drawn.cotangents)
        shorter = attention(
            drawn.primals[0], drawn.primals[1][:, :9], drawn.primals[2][:, :9], bias=DenseBias(bias[..., :9])
        )
        np.testing.assert_allclose(out, shorter, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(np.asarray(out)[0, 3], 0)
        np.testing.assert_array_equal(np.asarray(lse)[0, 3], -np.inf)
        assert all(np.isfinite(x).all() for x in gradients)
