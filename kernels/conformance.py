"""The conformance cases of attention: what every backend must compute, in NumPy, and a comparison on this device.

The tests run every backend through `CASES`, against `reference`: float64, with the derivative by hand. On a chip,
`compare` runs a backend through any case, against plain JAX in float32 at the highest precision: its error may be
`MARGIN` times what plain JAX loses in the same 16 bits, two runs must give the same bits, and whatever gradient comes
for the lse of an empty row must go nowhere.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .backends import BACKENDS
from .bias import AlibiBias, DenseBias, DistanceKeys, RelativeBias, bucket_edges
from .call import Call
from .hash import keep, key_words, query_words, row_seeds
from .tuning import Features

SEED = np.array([12, 3456], np.uint32)
MARGIN = 2.0
"""Error that a backend may have, as a multiple of what plain JAX has in the same dtype."""
LEAST = 1e-5
"""Relative error that is always allowed: where plain JAX happens to be exact."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: sizes and options. `bias` is a kind, its arrays are drawn; `segments` is how segment ids are drawn."""

    name: str
    sizes: tuple[int, int, int, int, int, int, int] = (2, 17, 17, 2, 2, 8, 8)
    """B, L, S, H, K, D, Dv."""
    bias: str | None = None
    bias_shape: tuple[int, int] = (1, 1)
    segments: str | None = None
    rate: float = 0.0
    options: dict = dataclasses.field(default_factory=dict)
    placed: bool = False
    """Whether each token has a place of its own for dropout, other than where it is."""

    def stretched(self, times: int) -> Case:
        """Return the same case with longer rows, by this factor."""
        b, q_len, k_len, *rest = self.sizes
        return dataclasses.replace(self, sizes=(b, q_len * times, k_len * times, *rest))


CROSS = (2, 19, 33, 2, 2, 8, 12)
GROUPED = (1, 21, 21, 4, 2, 16, 8)
CASES = [
    Case("plain"),
    Case("cross, odd lengths, other value size, scale", CROSS, options={"scale": 1.0}),
    Case("causal, fewer queries", (1, 9, 14, 2, 2, 8, 8), options={"causal": True}),
    Case("causal, fewer keys", (1, 14, 9, 2, 2, 8, 8), options={"causal": True}),
    Case("window, dense bias shared by heads", bias="dense", bias_shape=(2, 1), options={"window": (3, 5)}),
    Case("window that leaves late queries nothing", (1, 23, 9, 2, 2, 8, 8), options={"window": (2, None)}),
    Case("packed, dropout", segments="packed", rate=0.2, placed=True),
    Case("segments in any order, grouped heads, dropout", GROUPED, segments="any", rate=0.3),
    Case("cross, segments, alibi", CROSS, bias="alibi", segments="any"),
    Case("softcap, dense bias shared by rows", CROSS, bias="dense", bias_shape=(1, 2), options={"softcap": 2.0}),
    Case("dense bias shared by rows and heads, packed", bias="dense", segments="packed"),
    Case("dense bias of each row and head, grouped", (2, *GROUPED[1:]), bias="dense", bias_shape=(2, 4), rate=0.1),
    Case("relative, packed, dropout", bias="relative", segments="packed", rate=0.2, options={"scale": 1.0}),
    Case("relative, causal, cross", CROSS, bias="relative causal", options={"causal": True, "scale": 1.0}),
    Case("alibi, causal, window, one key head", (2, 18, 18, 4, 1, 8, 8), bias="alibi",
         options={"causal": True, "window": (6, None)}),
    Case("all together", (1, 27, 35, 2, 1, 8, 12), bias="relative", segments="any", rate=0.15,
         options={"window": (13, 17), "softcap": 3.0, "scale": 0.7}),
]  # fmt: skip

PLAIN = [
    Case("keys of distances, causal with a memory", (2, 9, 14, 2, 2, 8, 8), bias="distance",
         options={"window": (None, 5)}),
    Case("keys of distances, one for each", (2, 11, 13, 4, 2, 8, 12), bias="distance", segments="any", rate=0.2,
         options={"softcap": 3.0, "scale": 0.7}),
]  # fmt: skip
"""Cases that plain JAX alone computes."""

BIASES = {
    "distance": DistanceKeys,
    "dense": DenseBias,
    "relative": functools.partial(RelativeBias, bidirectional=True, max_distance=20),
    "relative causal": functools.partial(RelativeBias, bidirectional=False, max_distance=20),
    "alibi": AlibiBias,
}
BUCKETS = 8
SIZE = 6
"""Size of the keys of distances."""


def draw_segments(kind: str, generator: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """Draw int32 [rows, length]; "any": in no order, a tenth padding; "packed": ascending, then padding, once alone."""
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
    places: tuple[np.ndarray, ...] | None
    """Row and index of each query, [B, L], and index of each key, [B, S], as dropout takes them."""


def draw(case: Case, dtype: str = "float32") -> Drawn:
    """Draw a case's arrays in this dtype; a bias and the gradient of lse in float32 (a bias in float64 for float64)."""
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
    if case.bias == "distance":
        # Those of later tokens have no key where a window hides them.
        later = q_len - 1 if "window" in case.options else 0
        primals += [normal(b, q_len, heads, SIZE), normal(q_len + k_len - 1 - later, heads, SIZE)]
    elif case.bias is not None:
        primals.append(normal(*shapes[case.bias]).astype("float64" if dtype == "float64" else "float32"))
    ids: list[Any] = [None, None]
    if case.segments is not None:
        ids = [draw_segments(case.segments, generator, b, length) for length in (q_len, k_len)]
        if q_len == k_len:
            ids[1] = ids[0]
    cotangents = normal(b, q_len, heads, v_size), generator.normal(size=(b, q_len, heads)).astype(np.float32)
    places = [generator.integers(0, most, (b, n), np.int32) for most, n in ((b, q_len), (q_len, q_len), (k_len, k_len))]
    drawn = Drawn(tuple(primals), cotangents, ids[0], ids[1], tuple(places) if case.placed else None)
    # What a loss makes of an empty row's lse, -inf, may itself be infinite or not a number.
    drawn.cotangents[1][empty_rows(case, drawn)] = np.nan
    return drawn


def made(case: Case, drawn: Drawn, primals: Sequence[Any], seed: Any = SEED) -> Call:
    """Return the case as backends receive it."""
    query, key, value, *bias = primals
    places = drawn.places
    return Call.of(
        query=query,
        key=key,
        value=value,
        bias=BIASES[case.bias](*bias) if case.bias else None,
        query_segment_ids=drawn.query_ids,
        key_segment_ids=drawn.key_ids,
        dropout_rate=case.rate,
        dropout_seed=seed if places is None else row_seeds(jnp.asarray(seed), jnp.asarray(places[0])),
        dropout_positions=None if places is None else (places[1], places[2]),
        **case.options,
    )


def call(case: Case, drawn: Drawn, implementation: str, seed: Any = SEED) -> Callable[..., tuple[Array, Array]]:
    """Return the case as a function of its primals, which gives (output, lse) as the named backend computes them."""

    def function(*primals: Any) -> tuple[Array, Array]:
        given = made(case, drawn, primals, seed)
        backend = BACKENDS[implementation]
        if reason := backend.supports(given):
            raise NotImplementedError(f"implementation {implementation!r}: {reason}")
        return backend.run(given)

    return function


def features(case: Case, dtype: str) -> Features:
    """Return what a case proves of a backend that is right."""
    drawn = draw(case, dtype)
    return Features.of(made(case, drawn, drawn.primals))


def with_gradients(function: Callable[..., Any]) -> Callable[..., tuple[Array, ...]]:
    """Return a compiled function of (primals, cotangents), which gives (output, lse, *gradients)."""

    def run(primals: Any, cotangents: Any) -> tuple[Array, ...]:
        outputs, pull = jax.vjp(function, *primals)
        return (*outputs, *pull(tuple(c.astype(x.dtype) for c, x in zip(cotangents, outputs, strict=True))))

    return jax.jit(run)


def mask_of(case: Case, drawn: Drawn) -> np.ndarray:
    """Return which keys each query attends to, bool [B, 1, L, S], from the words of the contract."""
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
    if drawn.query_ids is not None and drawn.key_ids is not None:
        mask &= drawn.query_ids[:, None, :, None] == drawn.key_ids[:, None, None, :]
        mask &= drawn.query_ids[:, None, :, None] != 0
    return mask


def empty_rows(case: Case, drawn: Drawn) -> np.ndarray:
    """Return which queries have nothing to attend to: bool [B, L]."""
    return ~np.broadcast_to(mask_of(case, drawn).any((1, 3)), (case.sizes[0], case.sizes[1]))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def kept_of(rate: float, rows: int, heads: int, queries: int, keys: int) -> Array:
    """Return dropout's bits [B, H, L, S], from the hash (which has tests of its own)."""
    a, b = query_words(row_seeds(jnp.asarray(SEED), jnp.arange(rows)), jnp.arange(heads), jnp.arange(queries))
    g = key_words(jnp.arange(keys))
    return keep(a[..., None], b[..., None], g[None, None, None, :], rate)


def reference(case: Case, drawn: Drawn) -> tuple[np.ndarray, ...]:
    """Compute (output, lse, *gradients) in float64: the formula, and its derivative by hand."""
    q, k, v, *bias = (x.astype(np.float64) for x in drawn.primals)
    d_out, d_lse = (x.astype(np.float64) for x in drawn.cotangents)
    b, q_len, k_len, heads, k_heads, size, _ = case.sizes
    group = heads // k_heads
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scale, softcap = case.options.get("scale", size**-0.5), case.options.get("softcap")

    scores = scale * np.einsum("blhd,bshd->bhls", q, k)
    distance = np.arange(k_len)[None, :] - np.arange(q_len)[:, None]
    bucket = places = of_pairs = np.zeros((0,))
    if case.bias == "dense":
        scores = scores + bias[0]
    elif case.bias == "alibi":
        scores = scores - bias[0][:, None, None] * np.abs(distance)
    elif case.bias == "distance":
        # As a batch of products, each query with the keys of its own distances.
        places = distance + q_len - 1
        keyed = (places < len(bias[1]))[:, :, None, None]
        of_pairs = np.where(keyed, bias[1][np.minimum(places, len(bias[1]) - 1)], 0)  # [L, S, H, F]
        scores = scores + scale * np.einsum("blhf,lshf->bhls", bias[0], of_pairs)
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
        if drawn.places is not None:
            rows, queries, keys = drawn.places
            factor = factor[rows[:, None, :, None], np.arange(heads)[:, None, None], queries[:, None, :, None],
                            keys[:, None, None]]  # fmt: skip
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
    elif case.bias == "distance":
        gradients.append(scale * np.einsum("bhls,lshf->blhf", d_scores, of_pairs))
        pairs = scale * np.einsum("bhls,blhf->lshf", d_scores, bias[0])
        gradients.append(np.stack([pairs[places == n].sum(0) for n in range(len(bias[1]))]))
    elif case.bias == "alibi":
        gradients.append(-(d_scores * np.abs(distance)).sum((0, 2, 3)))
    elif case.bias is not None:
        gradients.append(np.stack([d_scores[:, :, bucket == n].sum((0, 2)) for n in range(BUCKETS)]))
    return out, np.moveaxis(lse, 1, 2), *gradients


def error(found: Any, expected: np.ndarray) -> float:
    """Return the norm of the difference over the norm of `expected`; raise an AssertionError if infinities differ."""
    found = np.asarray(found, np.float64)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(found[~finite], expected[~finite])
    return float(np.linalg.norm(found[finite] - expected[finite]) / max(np.linalg.norm(expected[finite]), 1e-30))


LABELS = ("output", "lse", "query", "key", "value", "bias", "bias, second array")
"""What `with_gradients` returns: the output, lse, and the gradients of the rest."""


def compare(case: Case, implementation: str, dtype: str, *, exact: bool = False) -> dict[str, Any]:
    """Run a backend on the default device, and compare it with plain JAX there.

    Args:
      case: what to run.
      implementation: name of the backend.
      dtype: of the case's arrays.
      exact: whether to measure errors against `reference` rather than plain JAX in float32: for small cases.

    Returns:
      "errors": for each of `LABELS` its relative error and plain JAX's in the same dtype; "wrong": what is wrong, in
      lines.
    """
    drawn = draw(case, dtype)

    def run(name: str, dtype: str) -> Callable[[], list[np.ndarray]]:
        primals = [jnp.asarray(x, dtype if n < 3 else None) for n, x in enumerate(drawn.primals)]
        program = with_gradients(call(case, drawn, name))
        return lambda: [np.asarray(x.astype(jnp.float32)) for x in program(primals, drawn.cotangents)]

    ours = run(implementation, dtype)
    found, again = ours(), ours()
    usual = run("xla", dtype)()
    if exact:
        truth = [np.asarray(x) for x in reference(case, drawn)]
    else:
        with jax.default_matmul_precision("highest"):
            truth = run("xla", "float32")()
    return verdict(found, again, usual, truth)


def verdict(
    found: Sequence[np.ndarray], again: Sequence[np.ndarray], usual: Sequence[np.ndarray], truth: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Judge a backend's results and those of a second run, beside plain JAX's in the same dtype and the exact ones."""
    errors: dict[str, tuple[float, float]] = {}
    wrong: list[str] = []
    for label, ours, second, plain, exact in zip(LABELS, found, again, usual, truth, strict=False):
        if not np.array_equal(ours, second, equal_nan=True):
            wrong.append(f"{label}: two runs differ")
        finite = np.isfinite(exact)
        if not np.array_equal(ours[~finite], exact[~finite]) or not np.isfinite(ours[finite]).all():
            wrong.append(f"{label}: not finite, or finite, in the wrong places")
            continue
        own, allowed = errors[label] = error(ours, exact), error(plain, exact)
        if own > MARGIN * allowed + LEAST:
            wrong.append(f"{label}: an error of {own:.2g}, more than {MARGIN:g} x {allowed:.2g}")
    return {"errors": errors, "wrong": wrong}


def case_of(fields: Mapping[str, Any]) -> Case:
    """Build a case from its fields as JSON keeps them."""

    def whole(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    given: Any = whole(fields) | {"options": whole(fields.get("options", {}))}
    return Case(**given)


def main() -> None:
    """Compare what the job on standard input says, {implementation, dtype, cases}; print what is wrong, as JSON."""
    job = json.load(sys.stdin)
    answers, sys.stdout = sys.stdout, sys.stderr  # keep a compiler's own output out of the answer
    wrong: list[str] = []
    for fields in job["cases"]:
        found = compare(case_of(fields), job["implementation"], job["dtype"])
        wrong += [f"{fields['name']}: {line}" for line in found["wrong"]]
    print(json.dumps({"wrong": wrong}), file=answers, flush=True)


if __name__ == "__main__":
    main()
