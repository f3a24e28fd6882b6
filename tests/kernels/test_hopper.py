"""What the conformance suite does not ask of the Hopper kernels: float16, large heads, the choice of kernels."""

import dataclasses
import itertools
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.kernels import DenseBias, RelativeBias, row_seeds, xla
from bestiary.kernels.bench.cases import CORPORA, pack
from bestiary.kernels.blocks import Area
from bestiary.kernels.call import Call
from bestiary.kernels.hopper import backend as hopper
from bestiary.kernels.hopper import forward as hopper_forward
from bestiary.kernels.hopper import short as hopper_short
from bestiary.kernels.hopper.bias import _needed_steps
from bestiary.kernels.hopper.tile import Options
from bestiary.kernels.hopper.work import Schedule, Work, work


def make_call(
    *,
    queries: int = 150,
    keys: int = 100,
    heads: int = 2,
    key_heads: int = 1,
    size: int = 64,
    value_size: int | None = None,
    dtype: Any = jnp.bfloat16,
    scale: float | None = None,
) -> Call:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    return Call(
        query=normal(1, queries, heads, size),
        key=normal(1, keys, key_heads, size),
        value=normal(1, keys, key_heads, value_size or size),
        bias=None,
        query_segment_ids=None,
        key_segment_ids=None,
        dropout_seeds=None,
        causal=False,
        window=(None, None),
        scale=scale or size**-0.5,
        softcap=None,
        dropout_rate=0.0,
    )


def outcome(call: Call, run: Any) -> dict[str, np.ndarray]:
    """Output, lse and every gradient, of a loss that both outputs enter."""
    rng = np.random.default_rng(1)
    shape = (*call.query.shape[:3], call.value.shape[3])
    weights, lse_weights = (jnp.asarray(rng.normal(size=shape[:n]), jnp.float32) for n in (4, 3))

    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        out, lse = run(dataclasses.replace(call, query=query, key=key, value=value))
        return jnp.sum(out.astype(jnp.float32) * weights) + jnp.sum(lse * lse_weights), (out, lse)

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (_, outputs), gradients = step(call.query, call.key, call.value)
    names = ("output", "lse", "query", "key", "value")
    return {name: np.asarray(x.astype(jnp.float32)) for name, x in zip(names, (*outputs, *gradients), strict=True)}


def in_float32(call: Call) -> Call:
    query, key, value = (x.astype(jnp.float32) for x in (call.query, call.key, call.value))
    return dataclasses.replace(call, query=query, key=key, value=value)


def check(call: Call, tuning: hopper.Tuning) -> None:
    """The error is at most twice that of plain jax.numpy on the same 16-bit inputs, in every output and gradient."""
    with hopper.interpreting():
        assert hopper.supports(call) is None
        ours = outcome(call, lambda call: hopper.run(call, tuning))
    exact, plain = outcome(in_float32(call), xla.run), outcome(call, xla.run)
    for name, expected in exact.items():
        lost = [np.linalg.norm(found[name] - expected) for found in (ours, plain)]
        assert lost[0] <= 2 * lost[1] + 1e-5 * np.linalg.norm(expected), (name, lost)


def test_float16_and_unequal_heads() -> None:
    call = make_call(queries=70, keys=66, heads=2, size=32, value_size=96, dtype=jnp.float16, scale=-0.3)
    check(call, hopper.blocks_for(32, 96))


def test_largest_head() -> None:
    """With dropout and a window: where registers are scarcest, the keys' hash words are read late."""
    call = make_call(queries=70, keys=66, heads=1, size=256)
    seeds = row_seeds(jnp.asarray([1, 2], jnp.uint32), jnp.arange(1))
    call = dataclasses.replace(call, dropout_rate=0.2, dropout_seeds=seeds, window=(40, 9))
    check(call, hopper.blocks_for(256, 256, dropout=True))


def test_three_groups_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several items a block, the last of them not full; maxima that grow by little, by much and not at all."""
    monkeypatch.setattr(hopper_forward, "MULTIPROCESSORS", 2)
    call = make_call(queries=400, keys=260, key_heads=2, size=16)
    growth = jnp.repeat(jnp.asarray([1.0, 2.0, 1.5, 30.0, 1.0], jnp.bfloat16), 64)[: call.key.shape[1]]
    call = dataclasses.replace(call, key=call.key * growth[None, :, None, None])
    tuning = dataclasses.replace(hopper.blocks_for(16, 16), forward=hopper.Blocks(3, 64, 2))
    check(call, tuning)


@pytest.mark.parametrize(
    ("batch", "queries", "change", "groups"),
    [
        (64, 2016, {}, 3),
        # Tiles of 192 queries fit 512 badly, and leave registers for nothing else.
        (64, 512, {}, 2),
        (64, 2016, {"causal": True}, 2),
        (64, 2016, {"window": (9, None)}, 2),
        (64, 2016, {"softcap": 2.0}, 2),
    ],
)
def test_three_groups_where_they_fit(batch: int, queries: int, change: dict[str, Any], groups: int) -> None:
    shape = jax.ShapeDtypeStruct((batch, queries, 4, 64), jnp.bfloat16)
    arrays: dict[str, Any] = dict.fromkeys(("query", "key", "value"), shape)
    call = dataclasses.replace(make_call(queries=1, keys=1), **arrays, **change)
    assert hopper.rule(call).forward == hopper.Blocks(groups, 128, 2)


@pytest.mark.parametrize(
    ("queries", "keys", "size", "change", "forward", "backward"),
    [
        (128, 128, 64, {}, True, True),
        (128, 128, 64, {"bias": "row", "segments": True, "dropout_rate": 0.1}, True, True),
        (256, 128, 64, {"segments": True}, True, True),
        # More keys than two warpgroups can hold dk and dv of.
        (256, 129, 64, {}, True, False),
        (257, 64, 64, {}, False, False),
        (64, 257, 64, {}, False, False),
        # Too much shared memory.
        (128, 128, 128, {}, False, False),
        (64, 64, 128, {}, True, True),
        (64, 64, 64, {"bias": "dense"}, True, False),
        (128, 256, 64, {"bias": "dense"}, False, False),
    ],
)
def test_which_rows_are_short(
    queries: int, keys: int, size: int, change: dict[str, Any], forward: bool, backward: bool
) -> None:
    plain = Options(None, None, 1.0, None, None, segments=False, dropout_rate=0.0, interpret=False)
    options = dataclasses.replace(plain, **change)
    query, value = (1, queries, 4, size), (1, keys, 4, size)
    dtype = jnp.float32 if options.bias else jnp.bfloat16
    assert hopper_short.fits_forward(options, query, value, 2, dtype) == forward
    assert hopper_short.fits_backward(options, query, value, 2) == backward
    assert not hopper_short.fits_forward(options, query, value, 0, dtype)
    assert not hopper_short.fits_backward(options, query, value, 0)


SMALL = hopper.Tuning(*(hopper.Blocks(1, 64, 2) for _ in range(4)))


@pytest.mark.parametrize("kind", ["window", "segments"])
def test_tiles_that_are_not_needed_are_not_read(kind: str) -> None:
    """NaN in a tile of which nothing is needed would spread from any product with it, even a masked one."""
    # Of keys within the window of queries that look at poison, the gradients are poisoned too.
    tile, poisoned, clean = np.arange(256) // 64, *(([3], 0) if kind == "window" else ([0, 3], 64))
    poison = jnp.where(jnp.asarray(np.isin(tile, poisoned))[None, :, None, None], jnp.nan, 0.0)
    call = make_call(queries=256, keys=256, heads=1, size=32)
    changed = {name: getattr(call, name) + poison.astype(jnp.bfloat16) for name in ("query", "key", "value")}
    if kind == "window":
        changed |= {"window": (64, 64)}
    else:
        ids = (jnp.asarray(np.array(of_tiles, np.int32)[tile])[None] for of_tiles in ([1, 2, 2, 3], [1, 2, 9, 3]))
        changed |= dict(zip(("query_segment_ids", "key_segment_ids"), ids, strict=True))
    with hopper.interpreting():
        found = outcome(dataclasses.replace(call, **changed), lambda call: hopper.run(call, SMALL))
    for name, array in found.items():
        assert np.isfinite(array[:, clean : clean + 63]).all(), name
        assert not np.isfinite(array[:, 192:]).any(), name


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize(("left", "right"), [(None, None), (None, 0), (5, 9), (20, None)])
@pytest.mark.parametrize(("queries", "keys"), [(24, 24), (13, 29)])
def test_work_is_all_that_is_needed(
    queries: int, keys: int, left: int | None, right: int | None, segments: bool, axis: int
) -> None:
    """Between `first` and `stop` lies every pair that attends; what is called clear is the first run of whole tiles."""
    down, across = 4, 3
    generator = np.random.default_rng(queries)
    ids = [np.sort(generator.integers(1, 4, (2, n)), axis=1).astype(np.int32) for n in (queries, keys)]
    ids[0][1, -2:] = 0
    distance = np.arange(keys)[None] - np.arange(queries)[:, None]
    mask = np.broadcast_to((distance >= -(left or keys + queries)) & (distance <= (keys if right is None else right)),
                           (2, queries, keys))  # fmt: skip
    if segments:
        mask = mask & (ids[0][:, :, None] == ids[1][:, None]) & (ids[0] != 0)[:, :, None]
    items = work(
        Area(queries, keys, left, right),
        down,
        across,
        *(map(jnp.asarray, ids) if segments else (None, None)),
        axis=axis,
    )
    own, other = (down, across) if axis == 1 else (across, down)
    mask = mask if axis == 1 else mask.swapaxes(1, 2)
    for b, block in np.ndindex(2, -(-mask.shape[1] // own)):
        found = items.all
        if items.ranges is not None:
            found = Work(*np.asarray(items.ranges)[b % items.ranges.shape[0], block])
        cut = range(0, mask.shape[2], other)
        tiles = [mask[b, block * own : (block + 1) * own, start : start + other] for start in cut]
        for n, tile in enumerate(tiles):
            assert found.first <= n < found.stop or not tile.any()
            # Queries beyond the last do no harm, keys do.
            assert not found.whole(n) or (tile.all() and (axis == 2 or tile.shape[1] == other))
        whole = [tile.all() and tile.shape == (own, other) for tile in tiles]
        run = itertools.takewhile(bool, itertools.dropwhile(lambda yes: not yes, whole))
        assert sum(bool(found.whole(n)) for n in range(len(tiles))) >= len(list(run))


def taken(batch: int, heads: int, tiles: int, blocks: int, area: Area, size: int, ids: Any) -> tuple[Any, Any, Any]:
    """What each block takes in each round, [grid, rounds]: batch row, head, tile, and whether there is such an item.

    With it, the schedule's table and the ranges of the work, each an array or None.
    """

    @jax.jit
    def compute(ids: Any) -> tuple[Any, Any, Any]:
        items = work(area, size, size, ids, ids, axis=1)
        schedule = Schedule.of(batch, heads, tiles, blocks, items)
        numbers, rounds = jnp.arange(schedule.grid), jnp.arange(schedule.rounds)
        counts = schedule.count(numbers, schedule.table)
        found = schedule.item(schedule.number(numbers[:, None], rounds[None, :], schedule.table))
        return (*found, rounds[None, :] < counts[:, None]), schedule.table, items.ranges

    return jax.tree.map(np.asarray, compute(ids))


@pytest.mark.parametrize("kind", ["causal", "window", "wikipedia", "short", "full"])
@pytest.mark.parametrize("shape", [(32, 512, 32), (16, 1024, 16), (8, 2048, 32), (4, 4096, 32), (4, 4096, 16)])
def test_blocks_end_at_about_the_same_time(kind: str, shape: tuple[int, int, int]) -> None:
    """Of 132 blocks, each takes a time that is its tiles of keys, and one for what an item costs besides."""
    batch, length, heads = shape
    ids = jnp.asarray(pack(CORPORA[kind], batch, length, seed=0)) if kind in CORPORA else None
    area = Area(length, length, 300 if kind == "window" else None, 0 if kind in ("causal", "window") else None)
    tiles = length // 128
    (b, head, tile, there), _, ranges = taken(batch, heads, tiles, 132, area, 128, ids)
    count = np.zeros((batch, heads, tiles), int)
    np.add.at(count, (b[there], head[there], tile[there]), 1)
    assert (count == 1).all()
    ranges = np.broadcast_to([[[0, tiles]]] if ranges is None else ranges[..., :2], (batch, tiles, 2))
    cost = (ranges[..., 1] - ranges[..., 0] + 1)[b % batch, tile] * there
    busy = cost.sum(axis=1)
    # Items of nearly equal length end with a round that not all blocks have; there is little to arrange.
    assert busy.sum() / 132 / busy.max() >= (0.96 if kind in ("full", "short") else 0.97)
    if kind == "causal":
        assert (np.diff(cost, axis=1)[there[:, 1:]] <= 0).all()


@pytest.mark.parametrize(("batch", "heads", "blocks"), [(1, 1, 132), (3, 2, 4), (2, 3, 5), (5, 1, 7)])
@pytest.mark.parametrize("segments", [False, True])
def test_every_item_is_taken_once(batch: int, heads: int, blocks: int, segments: bool) -> None:
    ids = None
    if segments:
        ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 4, (batch, 40)), axis=1).astype(np.int32))
    (b, head, tile, there), table, _ = taken(batch, heads, 10, blocks, Area(40, 40, None, 0), 4, ids)
    assert (table is None) == (batch * heads * 10 <= blocks)
    found = sorted(zip(b[there].tolist(), head[there].tolist(), tile[there].tolist(), strict=True))
    assert found == list(itertools.product(range(batch), range(heads), range(10)))


def test_refusals_say_why() -> None:
    call = make_call()
    assert "Hopper GPU" in (hopper.supports(call) or "")
    with hopper.compiling():
        assert hopper.supports(call) is None
        assert "bfloat16 or float16" in (hopper.supports(in_float32(call)) or "")
        assert "256" in (hopper.supports(make_call(size=272)) or "")


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("segments", [False, True])
def test_the_steps_of_a_bands_block_are_those_it_needs(parts: int, segments: bool) -> None:
    """By looking at every tile of every band."""
    batch, length, rows, columns = 5, 40, 8, 4
    ids = None
    if segments:
        ids = jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 5, (batch, length)), axis=1).astype(np.int32))
    items = work(Area(length, length, None, 3), rows, columns, ids, ids, axis=1)
    assert items.ranges is not None
    steps, counts = map(np.asarray, _needed_steps(items.ranges, batch, length // columns, rows // columns, parts))
    ranges = np.broadcast_to(np.asarray(items.ranges), (batch, length // rows, 4))
    share = -(-batch // parts)
    for band, part in np.ndindex(*counts.shape):
        offset = band - (length // rows - 1) * 2
        expected = [
            b * (length // rows) + i
            for b in range(part * share, min(batch, (part + 1) * share))
            for i in range(length // rows)
            if ranges[b, i, 0] <= i * 2 + offset < ranges[b, i, 1]
        ]
        assert steps[band, part, : counts[band, part]].tolist() == expected
    assert counts.sum() == (ranges[..., 1] - ranges[..., 0]).sum()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"heads": 65536, "queries": 8, "keys": 8}, "at most 65535 heads, the length of a grid's axis, found 65536"),
        ({"queries": 65535 * 128 + 1, "keys": 8}, "at most 65535 tiles of queries.*found 65536"),
        ({"queries": 8, "keys": 65535 * 128 + 1}, "at most 65535 tiles of keys.*found 65536"),
        ({"queries": 32768, "keys": 16384, "bias": "dense"}, "at most 65535 tiles of a dense bias.*found 65536"),
        ({"queries": 32640, "keys": 16384, "bias": "dense"}, None),
        ({"queries": 128 * 20000, "keys": 64 * 30000, "bias": "row"}, "diagonals of tiles of a bias.*found 69998"),
    ],
)
def test_calls_that_a_grid_cannot_hold_are_refused(change: dict[str, Any], reason: str | None) -> None:
    change = dict(change)
    heads, bias = change.pop("heads", 2), change.pop("bias", None)
    queries, keys = change["queries"], change["keys"]
    call = make_call(queries=1, keys=1)
    shapes = {"query": (1, queries, heads, 64), "key": (1, keys, heads, 64), "value": (1, keys, heads, 64)}
    arrays: dict[str, Any] = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    if bias == "dense":
        arrays["bias"] = DenseBias(jax.ShapeDtypeStruct((1, 1, queries, keys), jnp.float32))  # pyright: ignore
    elif bias == "row":
        arrays["bias"] = RelativeBias(jax.ShapeDtypeStruct((32, heads), jnp.float32))  # pyright: ignore
    found = hopper._beyond_the_grid(dataclasses.replace(call, **arrays))
    assert found is None if reason is None else re.search(reason, found or "")


@pytest.mark.parametrize(
    ("version", "refused"), [(12040, False), (12080, True), (12090, True), (12091, False), (0, False)]
)
def test_cuda_that_miscompiles_masks_by_position(monkeypatch: pytest.MonkeyPatch, version: int, refused: bool) -> None:
    monkeypatch.setattr(hopper, "_cuda_version", lambda: version)
    monkeypatch.setattr(hopper.jax, "default_backend", lambda: "gpu")
    device = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")
    monkeypatch.setattr(hopper.jax, "local_devices", lambda: [device])
    monkeypatch.setattr(hopper.jax, "devices", lambda: [device])
    call = make_call()
    assert hopper.supports(call) is None
    for masked in (dataclasses.replace(call, causal=True), dataclasses.replace(call, window=(None, 7))):
        assert ("compiles masks by position wrongly" in (hopper.supports(masked) or "")) == refused
