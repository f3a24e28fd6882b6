"""The Hopper kernels in Pallas's GPU interpreter, with race detection on: numbers, gradients, dropout's bits, leakage.

Small tiles, so that rows of a hundred tokens already have several; the interpreter takes some 30 ms for each.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bestiary.kernels import AlibiBias, DenseBias, RelativeBias, hopper, xla
from bestiary.kernels.call import Call
from bestiary.kernels.hash import row_seeds

Blocks = hopper.Blocks
SMALL = hopper.Tuning(Blocks(2, 64, 2), Blocks(2, 64, 2), Blocks(2, 64, 2), Blocks(2, 64, 2))


def make_call(
    *,
    batch: int = 1,
    queries: int = 150,
    keys: int = 100,
    heads: int = 2,
    key_heads: int = 1,
    size: int = 64,
    value_size: int | None = None,
    dtype: Any = jnp.bfloat16,
    rate: float = 0.0,
    **fields: Any,
) -> Call:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    defaults: dict[str, Any] = {
        "bias": None,
        "query_segment_ids": None,
        "key_segment_ids": None,
        "causal": False,
        "window": (None, None),
        "scale": size**-0.5,
        "softcap": None,
    }
    seeds = row_seeds(jnp.array([3, 5], jnp.uint32), jnp.arange(batch)) if rate else None
    return Call(
        query=normal(batch, queries, heads, size),
        key=normal(batch, keys, key_heads, size),
        value=normal(batch, keys, key_heads, value_size or size),
        dropout_seeds=seeds,
        dropout_rate=rate,
        **(defaults | fields),
    )


def ids(length: int, *examples: int) -> jax.Array:
    """Segment ids [1, length]: examples of these lengths, padding behind; their numbers not in order."""
    numbers = [3, 1, 4, 2, 5]
    row = np.concatenate([np.full(n, i) for n, i in zip(examples, numbers, strict=False)])
    return jnp.asarray(np.pad(row, (0, length - row.size))[None], jnp.int32)


def outcome(call: Call, run: Any, *, backward: bool = True) -> dict[str, np.ndarray]:
    """Output, lse and every gradient, of a loss that both outputs enter."""
    rng = np.random.default_rng(1)
    shape = (*call.query.shape[:3], call.value.shape[3])
    weights = jnp.asarray(rng.normal(size=shape), jnp.float32)
    lse_weights = jnp.asarray(rng.normal(size=shape[:3]), jnp.float32)
    arrays = {"query": call.query, "key": call.key, "value": call.value}
    if call.bias is not None:
        arrays["bias"] = call.bias

    def loss(arrays: dict[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        out, lse = run(dataclasses.replace(call, **arrays))
        finite = jnp.where(lse == -jnp.inf, 0, lse)
        total = jnp.sum(out.astype(jnp.float32) * weights) + jnp.sum(finite * lse_weights)
        return total, {"out": out, "lse": lse}

    if not backward:
        results: dict[str, Any] = loss(arrays)[1]
    else:
        (_, results), grads = jax.value_and_grad(loss, has_aux=True)(arrays)
        results = results | {"d" + name: jax.tree.leaves(grad)[0] for name, grad in grads.items()}
    return {name: np.asarray(x.astype(jnp.float32)) for name, x in results.items()}


def in_float32(call: Call) -> Call:
    query, key, value = (x.astype(jnp.float32) for x in (call.query, call.key, call.value))
    return dataclasses.replace(call, query=query, key=key, value=value)


def interpreted(call: Call, tuning: hopper.Tuning = SMALL, *, backward: bool = True) -> dict[str, np.ndarray]:
    with hopper.interpreting():
        assert hopper.supports(call) is None
        return outcome(call, lambda call: hopper.run(call, tuning), backward=backward)


def check(call: Call, tuning: hopper.Tuning = SMALL, *, backward: bool = True) -> dict[str, np.ndarray]:
    """The error is at most twice that of plain jax.numpy on the same 16-bit inputs, in every output and gradient."""
    ours = interpreted(call, tuning, backward=backward)
    exact = outcome(in_float32(call), xla.run, backward=backward)
    plain = outcome(call, xla.run, backward=backward)
    for name, expected in exact.items():
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(ours[name][~finite], expected[~finite], err_msg=name)
        assert np.all(np.isfinite(ours[name][finite])), name

        def error(found: np.ndarray, expected: np.ndarray = expected, finite: np.ndarray = finite) -> float:
            return float(np.sqrt(np.mean((found[finite] - expected[finite]) ** 2)))

        size = np.sqrt(np.mean(expected[finite] ** 2))
        assert error(ours[name]) <= 2 * error(plain[name]) + 1e-5 * size, (name, error(ours[name]), error(plain[name]))
    return ours


def relative(heads: int) -> RelativeBias:
    return RelativeBias(jnp.asarray(np.random.default_rng(2).normal(size=(32, heads)), jnp.float32))


def test_causal_with_shared_key_heads() -> None:
    check(make_call(causal=True))


def test_everything_at_once() -> None:
    call = make_call(
        bias=relative(2),
        query_segment_ids=ids(150, 60, 50, 20),
        key_segment_ids=ids(100, 40, 20, 0, 25),
        window=(70, 30),
        softcap=4.0,
        rate=0.25,
    )
    check(call)


def test_segments_alone_skip_and_leave_empty_rows() -> None:
    call = make_call(queries=140, keys=140, query_segment_ids=ids(140, 64, 40), key_segment_ids=ids(140, 64, 40))
    found = check(call)
    assert np.all(found["out"][0, 104:] == 0)
    assert np.all(found["lse"][0, 104:] == -np.inf)


def test_dense_bias_shared_by_rows_and_heads() -> None:
    value = np.random.default_rng(2).normal(size=(1, 1, 70, 66))
    check(make_call(batch=2, queries=70, keys=66, bias=DenseBias(jnp.asarray(value, jnp.float32))))


def test_slopes_over_several_rows() -> None:
    check(make_call(batch=2, queries=130, keys=70, heads=1, bias=AlibiBias(jnp.array([0.5], jnp.float32))))


def test_small_heads_in_float16() -> None:
    check(make_call(queries=70, keys=66, heads=1, size=32, value_size=96, dtype=jnp.float16, scale=-0.3))


def test_head_sizes_that_must_be_padded() -> None:
    check(make_call(queries=70, keys=66, heads=1, size=40, value_size=56), backward=False)


def test_largest_head() -> None:
    call = make_call(queries=70, keys=66, heads=1, size=256)
    check(call, hopper.blocks_for(256, 256))


def test_dropout_bits_are_those_of_the_hash() -> None:
    call = make_call(queries=64, keys=64, key_heads=2, rate=0.4)
    call = dataclasses.replace(
        call, value=jnp.broadcast_to(jnp.eye(64, dtype=jnp.bfloat16)[None, :, None], (1, 64, 2, 64))
    )
    found, expected = interpreted(call, backward=False), outcome(call, xla.run, backward=False)
    dropped = expected["out"] == 0
    assert 0.3 < dropped.mean() < 0.5
    np.testing.assert_array_equal(found["out"] == 0, dropped)


def test_a_huge_key_in_another_segment_changes_nothing() -> None:
    segments = ids(100, 37, 50)
    call = make_call(queries=100, heads=1, query_segment_ids=segments, key_segment_ids=segments)
    key, value = (x.at[:, 40].set(1e4).at[:, 95].set(-1e4) for x in (call.key, call.value))
    with_planted = interpreted(dataclasses.replace(call, key=key, value=value))
    without = interpreted(call)
    for name in ("out", "lse", "dquery"):
        np.testing.assert_array_equal(with_planted[name][:, :37], without[name][:, :37], err_msg=name)
    for name in ("dkey", "dvalue"):
        np.testing.assert_array_equal(with_planted[name][:, :37], without[name][:, :37], err_msg=name)


def test_refusals_say_why() -> None:
    call = make_call()
    assert "Hopper GPU" in (hopper.supports(call) or "")
    with hopper.compiling():
        assert hopper.supports(call) is None
        assert "bfloat16 or float16" in (hopper.supports(in_float32(call)) or "")
        assert "256" in (hopper.supports(make_call(size=272)) or "")
