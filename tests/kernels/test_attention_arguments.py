"""Arguments that do not fit `attention`, and the choice of a backend: all known at trace time, nothing is computed."""

import types

import jax
import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct as Shape

from bestiary.kernels import AlibiBias, DenseBias, RelativeBias, attention, backends

QUERY, KEY, VALUE = (Shape(shape, jnp.float32) for shape in ((2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 6)))
IDS = Shape((2, 5), jnp.int32), Shape((2, 7), jnp.int32)
SEED = Shape((2,), jnp.uint32)


def trace(query=QUERY, key=KEY, value=VALUE, *, static=None, **arrays):
    """The output's shape. `static` are the arguments that are not arrays."""

    def function(query, key, value, arrays):
        return attention(query, key, value, **(static or {}), **arrays)

    return jax.eval_shape(function, query, key, value, arrays)


def test_a_call_that_fits():
    out = trace(
        query_segment_ids=IDS[0],
        key_segment_ids=IDS[1],
        dropout_seed=Shape((2, 2), jnp.uint32),
        bias=RelativeBias(Shape((32, 4), jnp.float32)),
        static={"dropout_rate": 0.1, "window": (None, 3), "causal": True, "softcap": 30, "scale": 1},
    )
    assert (out.shape, out.dtype) == ((2, 5, 4, 6), jnp.float32)
    out, lse = trace(*(x.update(dtype=jnp.bfloat16) for x in (QUERY, KEY, VALUE)), static={"return_lse": True})
    assert (out.dtype, lse.shape, lse.dtype) == (jnp.bfloat16, (2, 5, 4), jnp.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": Shape((2, 5, 8), jnp.float32)}, r"query: expected four dimensions .* found float32 \[2, 5, 8\]"),
        ({"key": Shape((2, 0, 2, 8), jnp.float32)}, r"key: expected .* none of them 0, found float32 \[2, 0, 2, 8\]"),
        ({"query": Shape((2, 5, 4, 8), jnp.int32)}, r"query: expected one of bfloat16, .* found int32 \[2, 5, 4, 8\]"),
        ({"value": Shape((2, 7, 2, 6), jnp.bfloat16)}, r"value: expected the query's dtype, float32, found bfloat16"),
        ({"key": Shape((3, 7, 2, 8), jnp.float32)}, r"key: expected \[2, S, K, 8\] .* found float32 \[3, 7, 2, 8\]"),
        ({"key": Shape((2, 7, 2, 6), jnp.float32)}, r"key: expected \[2, S, K, 8\] .* found float32 \[2, 7, 2, 6\]"),
        ({"key": Shape((2, 7, 3, 8), jnp.float32)}, r"key: expected .* K dividing 4, for query \[2, 5, 4, 8\], found"),
        ({"value": Shape((2, 6, 2, 6), jnp.float32)}, r"value: expected \[2, 7, 2, Dv\], for key .* \[2, 6, 2, 6\]"),
        ({"value": Shape((2, 7, 4, 6), jnp.float32)}, r"value: expected \[2, 7, 2, Dv\], for key .* \[2, 7, 4, 6\]"),
        ({"query_segment_ids": IDS[0]}, r"key_segment_ids: expected together with query_segment_ids, found None"),
        ({"key_segment_ids": IDS[1]}, r"query_segment_ids: expected together with key_segment_ids, found None"),
        (
            {"query_segment_ids": IDS[0], "key_segment_ids": IDS[0]},
            r"key_segment_ids: expected int32 \[2, 7\], found int32 \[2, 5\]",
        ),
        (
            {"query_segment_ids": Shape((2, 5), jnp.bool), "key_segment_ids": IDS[1]},
            r"query_segment_ids: expected int32 \[2, 5\], found bool \[2, 5\]",
        ),
        ({"static": {"dropout_rate": 0.1}}, r"dropout_seed: expected uint32 \[2\], \[2, 2\] or .* 0.1, found None"),
        ({"static": {"dropout_rate": 1.0}, "dropout_seed": SEED}, r"dropout_rate: expected a number in \[0, 1\)"),
        ({"static": {"dropout_rate": -0.5}}, r"dropout_rate: expected a number in \[0, 1\), found -0.5"),
        ({"dropout_seed": Shape((3, 2), jnp.uint32)}, r"dropout_seed: expected uint32 .* found uint32 \[3, 2\]"),
        ({"dropout_seed": Shape((2,), jnp.int32)}, r"dropout_seed: expected uint32 .* found int32 \[2\]"),
        ({"dropout_positions": (IDS[1], IDS[1])}, r"dropout_positions: expected int32 \(\[2, 5\], \[2, 7\]\), found"),
        ({"dropout_positions": (IDS[0],)}, r"dropout_positions: expected \(queries, keys\), found 1 arrays"),
        ({"static": {"window": 3}}, r"window: expected \(left, right\), .* found 3"),
        ({"static": {"window": (3, -1)}}, r"window: expected .* or None for no limit, found \(3, -1\)"),
        ({"static": {"window": (3,)}}, r"window: expected \(left, right\), .* found \(3,\)"),
        ({"static": {"scale": float("inf")}}, r"scale: expected a finite number, known when tracing, found inf"),
        ({"static": {"softcap": 0.0}}, r"softcap: expected a finite number > 0, .* found 0.0"),
        (
            {"bias": DenseBias(Shape((3, 4, 5, 7), jnp.float32))},
            r"bias.value: expected \[1 or 2, 1 or 4, 5, 7\], found float32 \[3, 4, 5, 7\]",
        ),
        ({"bias": DenseBias(Shape((1, 1, 5, 1), jnp.float32))}, r"bias.value: expected .* found float32 \[1, 1, 5, 1"),
        ({"bias": DenseBias(Shape((1, 1, 5, 7), jnp.int32))}, r"bias: expected floating-point values, found int32"),
        (
            {"bias": RelativeBias(Shape((4, 32), jnp.float32))},
            r"bias.table: expected \[an even number of buckets, 4\], found float32 \[4, 32\]",
        ),
        ({"bias": RelativeBias(Shape((31, 4), jnp.float32))}, r"bias.table: expected \[an even number of buckets, 4\]"),
        (
            {"bias": RelativeBias(Shape((32, 4), jnp.float32), max_distance=8)},
            r"bias: expected .* a max_distance beyond the distances .* found 32 buckets, max_distance 8",
        ),
        ({"bias": AlibiBias(Shape((2,), jnp.float32))}, r"bias.slopes: expected \[4\], found float32 \[2\]"),
        ({"bias": Shape((1, 1, 5, 7), jnp.float32)}, r"bias: expected DenseBias, .* or DistanceKeys, found"),
        ({"static": {"implementation": "flash"}}, r"implementation: expected one of .*xla.*, found 'flash'"),
    ],
)  # fmt: skip
def test_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        trace(**arguments)


def test_a_traced_scale_is_refused():
    with pytest.raises(ValueError, match="scale: expected a finite number, known when tracing"):
        jax.eval_shape(lambda scale: attention(*(jnp.ones((1, 2, 1, 4)),) * 3, scale=scale), Shape((), jnp.float32))


def test_a_window_wider_than_the_row_is_no_limit():
    query, key = jnp.sin(jnp.arange(24.0)).reshape(1, 3, 2, 4), jnp.cos(jnp.arange(40.0)).reshape(1, 5, 2, 4)
    wide, none, narrow = (attention(query, key, key, window=window) for window in ((2, 2**40), None, (2, 3)))
    assert jnp.array_equal(wide, none)
    assert not jnp.array_equal(narrow, none)


@pytest.fixture
def choices(monkeypatch):
    """Two backends in place of the real ones; the first refuses a softcap."""

    def backend(label: float, refuses: bool):
        def supports(call):
            return "no softcap on this chip" if refuses and call.softcap is not None else None

        def run(call):
            return jnp.full(call.query.shape, label), jnp.zeros(call.query.shape[:3])

        return types.SimpleNamespace(supports=supports, run=run)

    both = {"fast": backend(1.0, True), "slow": backend(2.0, False)}
    monkeypatch.setattr(backends, "BACKENDS", both)
    return both


def chosen(**options) -> float:
    x = jnp.ones((1, 2, 1, 4))
    return float(attention(x, x, x, **options)[0, 0, 0, 0])


def test_the_fastest_that_supports_the_call_is_taken(choices):
    assert chosen() == 1.0
    assert chosen(softcap=2.0) == 2.0
    assert chosen(implementation="slow") == 2.0


def test_a_named_backend_never_falls_back(choices):
    with pytest.raises(NotImplementedError, match="implementation 'fast': no softcap on this chip"):
        chosen(softcap=2.0, implementation="fast")


def test_no_backend_left(choices):
    del choices["slow"]
    with pytest.raises(NotImplementedError, match="implementation 'fast': no softcap on this chip"):
        chosen(softcap=2.0)
