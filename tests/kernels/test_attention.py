"""The conformance suite: what every backend of `attention` must do.

A backend joins by one entry in `BACKENDS`. It is compared with a float64 reference in NumPy (`kernels/conformance.py`,
which has the cases), which is itself compared with finite differences. The Pallas backends run in their interpreters,
with race detection on: short rows as they come, and rows of several tiles of their general kernels (`stretch`), which
take a choice of the cases.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bestiary.kernels import DenseBias, attention, row_seeds, xla
from bestiary.kernels.conformance import (
    CASES,
    LABELS,
    PLAIN,
    SEED,
    Case,
    Drawn,
    call,
    draw,
    empty_rows,
    error,
    kept_of,
    reference,
    with_gradients,
)
from bestiary.kernels.hopper import backend as hopper
from bestiary.kernels.hopper import backward as hopper_backward
from bestiary.kernels.hopper import forward as hopper_forward
from bestiary.kernels.hopper import short as hopper_short
from bestiary.kernels.split import splitting
from bestiary.kernels.tpu import backend as tpu
from bestiary.kernels.tpu.frame import Tiling


@contextlib.contextmanager
def _with(*patches: tuple[Any, str, Any]) -> Iterator[None]:
    """Some (module, name, value) replaced."""
    with pytest.MonkeyPatch.context() as patch:
        for where, name, value in patches:
            patch.setattr(where, name, value)
        yield


@contextlib.contextmanager
def _interpreted(module: Any, *patches: tuple[Any, str, Any]) -> Iterator[None]:
    """A backend's interpreter, with some (module, name, value) of its own replaced."""
    with _with(*patches), module.interpreting():
        yield


@dataclasses.dataclass(frozen=True)
class Backend:
    """How a backend is run here."""

    name: str
    context: Callable[[], AbstractContextManager] = contextlib.nullcontext
    """What its calls are traced and run under: an interpreter, where the chip is missing."""
    label: str = ""
    dtype: str = "float32"
    """The widest that it takes."""
    stretch: int = 1
    """By what the cases' lengths are multiplied, so that they make several tiles."""
    cases: tuple[str, ...] | None = None
    """The first words of those that it runs; None for all."""

    @property
    def interpreted(self) -> bool:
        return self.context is not contextlib.nullcontext

    def __str__(self) -> str:
        return self.label or self.name


# In one tile, and what no short row shows: the walk over tiles, what is skipped of it, sums over tiles.
ONE_TILE = ("causal, fewer keys", "packed", "dense bias of each", "alibi, causal", "all together")
SEVERAL_TILES = ("window that", "packed", "segments in", "dense bias shared by rows", "all together")
UNEVEN_TPU = tpu.Blocks(Tiling(256, 128, 256), Tiling(128, 256, 512), Tiling(256, 128, 256), 0)
SMALL_HOPPER = hopper.Tuning(
    hopper.Blocks(2, 64, 2), hopper.Blocks(1, 64, 2), hopper.Blocks(2, 64, 1), hopper.Blocks(1, 64, 2)
)
# Persistent blocks so have several items each, and the interpreter fewer blocks.
FUSES = ("plain", "cross", "causal, few", "window", "softcap", "dense bias shared", "relative, causal", "alibi")
FEW = [(module, "MULTIPROCESSORS", 2) for module in (hopper_forward, hopper_backward, hopper_short)]

BACKENDS = [
    Backend("xla"),
    Backend("tpu", functools.partial(_interpreted, tpu), "tpu, short rows", cases=ONE_TILE),
    Backend(
        "tpu",
        functools.partial(_interpreted, tpu, (tpu, "choose_blocks", lambda *_: UNEVEN_TPU)),
        "tpu",
        stretch=8,
        # And, with as many key heads as heads, the backward pass in one kernel with the row's gradient.
        cases=(*SEVERAL_TILES, "relative, causal"),
    ),
    Backend(
        "hopper",
        functools.partial(_interpreted, hopper, *FEW),
        "hopper, short rows",
        dtype="bfloat16",
        stretch=4,
        cases=ONE_TILE,
    ),
    Backend(
        "hopper",
        functools.partial(_interpreted, hopper, (hopper, "rule", lambda _: SMALL_HOPPER), *FEW),
        "hopper",
        dtype="bfloat16",
        stretch=4,
        cases=SEVERAL_TILES,
    ),
    Backend("xla", functools.partial(_with, (xla, "FUSED_SCORES", 0)), "xla, fused", cases=FUSES),
]


LABELLED = {str(backend): backend for backend in BACKENDS}


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with request.param.context():
        yield request.param


def on(which: Iterable[Backend], *cases: Case) -> pytest.MarkDecorator:
    """Run with these backends and, if there are any, these cases: of several tiles, where the backend asks for it."""
    if not cases:
        return pytest.mark.parametrize("backend", which, indirect=True, ids=str)
    chosen = [
        pytest.param(backend, case.stretched(backend.stretch), id=f"{backend}-{case.name}")
        for backend in which
        for case in cases
        if backend.cases is None or case.name.startswith(backend.cases)
    ]
    return pytest.mark.parametrize(("backend", "case"), chosen, indirect=["backend"])


EVERYTHING = CASES[-1]
PACKED = CASES[6]


@functools.cache
def compiled(backend: Backend, name: str, dtype: str) -> tuple[Drawn, Callable]:
    """A case's arrays for a backend, and (primals, cotangents) -> (output, lse, *gradients)."""
    (case,) = (case.stretched(backend.stretch) for case in (*CASES, *PLAIN) if case.name == name)
    drawn = draw(case, dtype)
    return drawn, with_gradients(call(case, drawn, backend.name))


@functools.cache
def outcome(backend: Backend, name: str, dtype: str) -> tuple[np.ndarray, ...]:
    drawn, run = compiled(backend, name, dtype)
    return tuple(np.asarray(x) for x in run(drawn.primals, drawn.cotangents))


@functools.cache
def plain_error(name: str, dtype: str, stretch: int) -> tuple[float, ...]:
    """What rounding does to the outputs and gradients of plain jax.numpy on a case's inputs of 16 bits."""
    plain = dataclasses.replace(LABELLED["xla"], stretch=stretch)
    (case,) = (case.stretched(stretch) for case in CASES if case.name == name)
    expected = reference(case, compiled(plain, name, dtype)[0])
    return tuple(error(x, y) for x, y in zip(outcome(plain, name, dtype), expected, strict=True))


def limits(backend: Backend, case: Case, dtype: str) -> tuple[float, ...]:
    """In float32 nothing but rounding is lost; in 16 bits no more than twice what plain jax.numpy loses."""
    if dtype == "float32":
        return (2e-6,) * 7
    if not backend.interpreted:
        # It rounds by up to 2**-9; weights, score gradients and the result are rounded once each.
        return (2**-7,) * 7
    return tuple(2 * x + 1e-5 for x in plain_error(case.name, dtype, backend.stretch))


def check(backend: Backend, case: Case, dtype: str) -> tuple[np.ndarray, ...]:
    found = outcome(backend, case.name, dtype)
    expected = reference(case, compiled(backend, case.name, dtype)[0])
    for label, ours, theirs, limit in zip(LABELS, found, expected, limits(backend, case, dtype), strict=False):
        assert ours.shape == theirs.shape, label
        assert error(ours, theirs) < limit, label
    return found


@on(BACKENDS, *CASES)
def test_outputs_and_gradients(backend, case):
    check(backend, case, backend.dtype)


@on([LABELLED["xla"], dataclasses.replace(LABELLED["xla, fused"], cases=None)], *PLAIN)
def test_outputs_and_gradients_of_plain_jax(backend, case):
    check(backend, case, "float32")


@on([LABELLED["xla"]], PLAIN[-1])
def test_bfloat16_of_plain_jax(backend, case):
    check(backend, case, "bfloat16")


@on([backend for backend in BACKENDS if backend.name != "xla"])
@pytest.mark.parametrize("case", PLAIN[:1], ids=lambda case: case.name)
def test_the_others_refuse_keys_of_distances(backend, case):
    drawn = draw(case, backend.dtype)
    with pytest.raises(NotImplementedError, match=f"{backend.name}.*no keys of distances"):
        jax.eval_shape(call(case, drawn, backend.name), *drawn.primals)


@on([backend for backend in BACKENDS if backend.dtype == "float32"], EVERYTHING)
def test_bfloat16(backend, case):
    found = check(backend, case, "bfloat16")
    assert [str(x.dtype) for x in found[:5]] == ["bfloat16", "float32", "bfloat16", "bfloat16", "bfloat16"]


@on(BACKENDS, PACKED)
def test_empty_rows_are_zero_and_send_no_gradient(backend, case):
    drawn, _ = compiled(backend, case.name, backend.dtype)
    out, lse, d_query, *others = outcome(backend, case.name, backend.dtype)
    empty = empty_rows(case, drawn)
    assert empty[-1].all()
    assert empty.any(1).all()
    assert np.isnan(drawn.cotangents[1][empty]).all()
    np.testing.assert_array_equal(out[empty].astype(np.float32), 0)
    np.testing.assert_array_equal(lse[empty], -np.inf)
    for gradient in (d_query, *others):
        assert np.isfinite(gradient.astype(np.float32)).all()
    np.testing.assert_array_equal(d_query[empty].astype(np.float32), 0)
    for gradient in others:
        np.testing.assert_array_equal(gradient[-1].astype(np.float32), 0)


@on(BACKENDS, EVERYTHING)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_what_is_not_attended_to_changes_nothing(backend, case):
    drawn, run = compiled(backend, case.name, backend.dtype)
    query, key, value, *bias = drawn.primals
    # Segment 2's keys and the padding's, seen by segment 2's queries alone, which get no cotangent.
    strange = (drawn.key_ids == 2) | (drawn.key_ids == 0)
    others = (drawn.query_ids != 2) & ~empty_rows(case, drawn)
    cotangents = tuple(np.where(others[(...,) + (None,) * (x.ndim - 2)], x, 0 * x) for x in drawn.cotangents)
    planted = np.where(strange[..., None, None], np.asarray(1e30, key.dtype), key)
    shouted = np.where(strange[..., None, None], np.asarray(3e38, value.dtype), value)
    found = run((query, planted, shouted, *bias), cotangents)
    expected = reference(case, dataclasses.replace(drawn, cotangents=cotangents))
    rows = (others, others, others, ~strange, ~strange)
    for label, ours, theirs, some, limit in zip(
        LABELS, found, expected, rows, limits(backend, case, backend.dtype), strict=False
    ):
        assert error(np.asarray(ours, np.float64)[some], theirs[some]) < 2 * limit, label


@on([LABELLED[label] for label in ("xla", "tpu", "hopper")])
def test_packed_equals_each_example_alone(backend):
    many = backend.stretch
    case = Case("packed", (1, 24 * many, 24 * many, 1, 1, 8, 8), bias="relative", options={"window": (7, 9)})
    lengths = (11 * many, 11 * many)
    drawn = draw(case, backend.dtype)
    table = drawn.primals[3]

    @jax.jit
    def run(arrays, cotangents, ids):
        function = call(case, dataclasses.replace(drawn, query_ids=ids, key_ids=ids), backend.name)
        outputs, pull = jax.vjp(function, *arrays, table)
        return (*outputs, *pull(cotangents))

    ids = np.repeat(np.array([1, 2, 0], np.int32), [*lengths, 2 * many])[None]
    packed = run(drawn.primals[:3], drawn.cotangents, ids)
    close = {"rtol": 1e-5, "atol": 1e-6} if backend.dtype == "float32" else {"rtol": 2**-6, "atol": 2**-7}
    of_table = np.zeros_like(table)
    start = 0
    for n in lengths:
        # In a row of its own, whose rest is padding, for the same program.
        own = np.arange(24 * many) < n

        def first(x, start=start, own=own):
            return np.where(own.reshape(1, -1, *[1] * (x.ndim - 2)), np.roll(x, -start, axis=1), 0 * x)

        alone = run(*(tuple(map(first, some)) for some in (drawn.primals[:3], drawn.cotangents)), np.int32(own)[None])
        for x, y in zip(packed[:5], alone[:5], strict=True):
            x, y = (np.asarray(z, np.float32) for z in (x[:, start : start + n], y[:, :n]))
            np.testing.assert_allclose(x, y, **close)
        of_table += alone[5]
        start += n
    assert error(packed[5], of_table) < (1e-5 if backend.dtype == "float32" else 2**-10)


@on(BACKENDS)
def test_dropout_bits(backend):
    """With equal scores and the identity as value, the output is the bits: of each row's seed, wherever it stands."""
    b, q_len, k_len, heads, rate = 2, 5 * backend.stretch, 28 * backend.stretch, 2, 0.25
    value = np.broadcast_to(np.eye(k_len, dtype=backend.dtype)[None, :, None, :], (b, k_len, heads, k_len))
    query, key = (np.zeros((b, n, heads, 8), backend.dtype) for n in (q_len, k_len))

    # The cases have one seed for all rows; a seed for each is the same, and so a batch may be split or shuffled.
    seeds = np.asarray(jax.jit(row_seeds)(SEED, np.arange(b)))[::-1]
    dropped = jax.jit(functools.partial(attention, dropout_rate=rate, implementation=backend.name))
    out = np.asarray(dropped(query, key, value, dropout_seed=seeds), np.float32)
    expected = np.asarray(kept_of(rate, b, heads, q_len, k_len))[::-1] / (1 - rate)
    close = {"rtol": 1e-6 if backend.dtype == "float32" else 2**-8}
    np.testing.assert_allclose(np.moveaxis(out * k_len, 1, 2), expected, **close)


@on(BACKENDS, EVERYTHING)
def test_runs_are_bit_equal(backend, case):
    drawn, run = compiled(backend, case.name, backend.dtype)
    first, second = outcome(backend, case.name, backend.dtype), run(drawn.primals, drawn.cotangents)
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)


@on([LABELLED[label] for label in ("xla", "tpu, short rows")])
def test_split_over_a_mesh_gathers_nothing(backend):
    case = Case("mesh", (4, 16, 16, 4, 2, 8, 8), bias="relative", segments="packed", rate=0.1)
    drawn = draw(case)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    heads, table = NamedSharding(mesh, P("data", None, "tensor", None)), NamedSharding(mesh, P(None, "tensor"))
    primals = [jax.device_put(x, s) for x, s in zip(drawn.primals, [heads] * 3 + [table], strict=True)]
    cotangents = [
        jax.device_put(drawn.cotangents[0], heads),
        jax.device_put(drawn.cotangents[1], heads.update(spec=P("data", None, "tensor"))),
    ]
    rows = NamedSharding(mesh, P("data", None))

    def run(primals, cotangents, ids, seed):
        split = dataclasses.replace(drawn, query_ids=ids, key_ids=ids)
        with splitting(mesh, batch="data", heads="tensor"):
            outputs, pull = jax.vjp(call(case, split, backend.name, seed), *primals)
            return (*outputs, *pull(tuple(cotangents)))

    arrays = primals, cotangents, jax.device_put(drawn.query_ids, rows), SEED
    shardings = (heads, None, heads, heads, heads, table)
    program = jax.jit(run, out_shardings=shardings).lower(*arrays).compile()
    assert "all-gather" not in program.as_text()
    for ours, expected in zip(program(*arrays), reference(case, drawn), strict=True):
        assert error(ours, expected) < 2e-6


@pytest.mark.parametrize("case", [EVERYTHING, PLAIN[-1]], ids=lambda case: case.name)
def test_reference_gradients_against_finite_differences(case):
    drawn = draw(case, "float32")
    drawn = dataclasses.replace(drawn, primals=tuple(x.astype(np.float64) for x in drawn.primals))
    gradients = reference(case, drawn)[2:]
    generator = np.random.default_rng(0)

    def loss(primals) -> float:
        out, lse, *_ = reference(case, dataclasses.replace(drawn, primals=tuple(primals)))
        finite = np.isfinite(lse)
        return float((out * drawn.cotangents[0]).sum() + (lse[finite] * drawn.cotangents[1][finite]).sum())

    for place, gradient in enumerate(gradients):
        direction = generator.normal(size=gradient.shape)
        step = 1e-6
        moved = [[x + sign * step * direction * (n == place) if n == place else x for n, x in enumerate(drawn.primals)]
                 for sign in (1, -1)]  # fmt: skip
        slope = (loss(moved[0]) - loss(moved[1])) / (2 * step)
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-6)


def test_xla_in_float64_is_exact():
    with jax.enable_x64(True):
        drawn = draw(EVERYTHING, "float64")
        found = with_gradients(call(EVERYTHING, drawn, "xla"))(drawn.primals, drawn.cotangents)
    for ours, expected in zip(found, reference(EVERYTHING, drawn), strict=True):
        assert ours.dtype == jnp.float64
        assert error(ours, expected) < 1e-12


def test_keys_of_distances_store_no_scores_of_all_pairs(monkeypatch):
    case = dataclasses.replace(PLAIN[0], sizes=(1, 64, 96, 1, 1, 4, 4))
    monkeypatch.setattr(xla, "BLOCK_SCORES", 8 * 96)
    drawn = draw(case)
    program = str(jax.make_jaxpr(with_gradients(call(case, drawn, "xla")))(drawn.primals, drawn.cotangents))
    assert "f32[1,1,8,96]" in program
    assert "64,96" not in program
    assert "64,159" not in program


@pytest.mark.parametrize("case", [CASES[9], EVERYTHING, *PLAIN], ids=lambda case: case.name)
def test_xlas_blocks_of_queries_change_nothing(monkeypatch, case):
    drawn = draw(case)
    monkeypatch.setattr(xla, "BLOCK_SCORES", case.sizes[1] * case.sizes[2] // 3)
    found = with_gradients(call(case, drawn, "xla"))(drawn.primals, drawn.cotangents)
    for ours, expected in zip(found, reference(case, drawn), strict=True):
        assert error(ours, expected) < 2e-6


def test_xla_takes_minus_infinity_in_a_dense_bias():
    case = Case("masking bias", bias="dense", bias_shape=(2, 1))
    drawn = draw(case)
    bias = np.where(np.arange(17) < 9, drawn.primals[3], np.float32(-np.inf))
    bias[0, 0, 3] = -np.inf
    drawn.cotangents[1][0, 3] = np.nan
    out, lse, *gradients = with_gradients(call(case, drawn, "xla"))((*drawn.primals[:3], bias), drawn.cotangents)
    query, key, value, _ = drawn.primals
    shorter = attention(query, key[:, :9], value[:, :9], bias=DenseBias(bias[..., :9]))
    np.testing.assert_allclose(out, shorter, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(out)[0, 3], 0)
    np.testing.assert_array_equal(np.asarray(lse)[0, 3], -np.inf)
    assert all(np.isfinite(x).all() for x in gradients)


# What XLA fuses into one kernel, where there are enough scores.


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.name.startswith(("window that", "cross, seg", "softcap", "alibi"))],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("blocks", [1, 3])
def test_xla_fused_without_a_gradient(case, blocks, monkeypatch):
    monkeypatch.setattr(xla, "FUSED_SCORES", 0)
    monkeypatch.setattr(xla, "BLOCK_SCORES", -(-case.sizes[1] * case.sizes[2] // blocks))
    drawn = draw(case)
    out, lse = jax.jit(call(case, drawn, "xla"))(*drawn.primals)
    expected, its_lse, *_ = reference(case, drawn)
    assert error(out, expected) < 2e-6
    assert error(lse, its_lse) < 2e-6


@pytest.mark.parametrize("rule", [{}, {"softcap": 2.0}], ids=["plain", "softcap"])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_xla_fused_survives_keys_of_any_size(monkeypatch, rule):
    """Partial sums of the products overflow in both directions; queries in an example of its own never see them."""
    monkeypatch.setattr(xla, "FUSED_SCORES", 0)
    case = Case("planted", (2, 24, 24, 2, 2, 8, 8), bias="relative", segments="packed", options=rule)
    drawn = draw(case)
    strange = (drawn.key_ids == 2) | (drawn.key_ids == 0)
    others = (drawn.query_ids != 2) & ~empty_rows(case, drawn)
    cotangents = tuple(np.where(others[(...,) + (None,) * (x.ndim - 2)], x, 0 * x) for x in drawn.cotangents)
    query, key, value, bias = drawn.primals
    planted = np.where(strange[..., None, None], np.float32(3e38), key)
    shouted = np.where(strange[..., None, None], np.float32(-3e38), value)
    out, lse = jax.jit(call(case, drawn, "xla"))(query, planted, shouted, bias)
    _, _, *gradients = with_gradients(call(case, drawn, "xla"))((query, planted, shouted, bias), cotangents)
    expected = reference(case, dataclasses.replace(drawn, cotangents=cotangents))
    for ours, theirs, some in zip((out, lse, *gradients), expected, (others,) * 3 + (~strange,) * 2, strict=False):
        assert error(np.asarray(ours)[some], theirs[some]) < 4e-6
    np.testing.assert_array_equal(np.asarray(out)[empty_rows(case, drawn)], 0)


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_xla_fused_never_has_the_scores_in_memory(dtype):
    case = Case("fused", (2, 256, 256, 8, 8, 16, 16), segments="packed")
    drawn = draw(case, dtype)
    run = call(case, drawn, "xla")

    def memory(function) -> int:
        return jax.jit(function).lower(*drawn.primals).compile().memory_analysis().temp_size_in_bytes

    scores = 4 * 2 * 8 * 256 * 256
    assert memory(lambda *primals: run(*primals)[0]) < scores / 2
    assert memory(run) > scores / 2
