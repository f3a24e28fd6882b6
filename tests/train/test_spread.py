"""One device, a mesh, pmap, parts of a batch and several processes: the same losses."""

import json
import signal
import socket
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from bestiary.models.layers.linear import LOGICAL_AXES
from bestiary.models.registry import init_params, presets
from bestiary.train.config import ParallelConfig
from bestiary.train.errors import RunError
from bestiary.train.sharding import (
    MESH_AXES,
    RULES,
    logical_specs,
    make_mesh,
    mesh_sharding,
    parse_mesh,
    start_parallelism,
)


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_losses(found: Path, expected: Path) -> None:
    """Masks and dropout included: only the order of float32 sums may differ."""
    mine, theirs = metrics(found), metrics(expected)
    assert [record.keys() for record in mine] == [record.keys() for record in theirs]
    for one, other in zip(mine, theirs, strict=True):
        assert one.get("total_tokens") == other.get("total_tokens")
        for key in one.keys() & {"loss", "mlm_loss", "nsp_loss", "eval/loss"}:
            assert one[key] == pytest.approx(other[key], rel=3e-5), (key, one["step"])


@pytest.mark.parametrize(
    ("devices", "flags"),
    [
        (8, ["--mesh", "fsdp=2,tensor=2,sequence=2"]),
        (1, ["--accumulate", "4"]),
        (1, ["--no-scan-layers", "--remat"]),
    ],
    ids=lambda value: "".join(value) if isinstance(value, list) else str(value),
)
def test_losses_of_one_device(workshop, uninterrupted, devices, flags):
    out = workshop.folder / f"spread{devices}{''.join(flags)}"
    workshop.pretrain(out, *flags, devices=devices)
    assert_same_losses(out, uninterrupted)


@pytest.mark.parametrize("parallel", ["mesh", "pmap"])
def test_two_processes_of_two_devices(workshop, uninterrupted, parallel, monkeypatch):
    """Stopped by a SIGTERM to one of them, both save and exit with 75; one process ends the run, to the same losses.

    One of the runs is in a store, and each process on a machine of its own.
    """
    out, machines = workshop.folder / f"processes-{parallel}", workshop.folder / "machines"
    run = f"file://{out}" if parallel == "mesh" else str(out)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--parallel", parallel, "--coordinator", f"127.0.0.1:{port}", "--processes", "2"]
    both = []
    for rank in (0, 1):
        monkeypatch.setenv("XDG_CACHE_HOME", str(machines / str(rank)))
        both.append(workshop.start(*workshop.arguments(run, *flags, "--process", str(rank)), devices=2))
    path = out / "metrics.jsonl"
    if parallel == "mesh":
        path = machines / "0" / "bestiary" / "mirror" / "file" / str(path).lstrip("/")
    while all(one.poll() is None for one in both) and not (path.exists() and '"step": 8,' in path.read_text()):
        time.sleep(0.02)
    both[1].send_signal(signal.SIGTERM)
    said = [one.communicate(timeout=120)[1] for one in both]
    assert [one.returncode for one in both] == [75, 75], said
    assert "stopped and saved at step" in said[0]
    assert "step" not in said[1]  # only process 0 speaks
    assert (out / "checkpoints").is_dir()
    assert "resuming from step" in workshop.pretrain(run)
    assert_same_losses(out, uninterrupted)


@pytest.mark.parametrize("parallel", ["mesh", "pmap"])
def test_fixed_arrays_reach_the_steps(parallel):
    """A teacher's parameters: sharded as others are over a mesh, whole in each replica."""
    mesh = {"mesh": "data=4,fsdp=2", "pmap": "data=8"}[parallel]
    spread = start_parallelism(ParallelConfig(parallel=parallel, mesh=mesh))
    fixed = spread.place({"w": np.arange(6.0, dtype=np.float32)}, {"w": PartitionSpec("embed")})

    def step(state, batch, replicas, fixed):
        found = replicas.sum((batch["x"] @ fixed["w"]).sum())
        return state + found, {"sum": found}

    batch = np.arange(48.0, dtype=np.float32).reshape(8, 6)
    placed, expected = spread.shard_batch({"x": batch}), float((batch @ np.arange(6)).sum())
    assert spread.compile_evaluate(lambda *given: step(*given)[1], fixed)(np.float32(0), placed)["sum"] == expected
    state, sums = spread.compile_train(step, PartitionSpec(), fixed)(jax.numpy.float32(1), placed)
    assert (float(state), float(sums["sum"])) == (1 + expected, expected)


def test_every_axis_of_the_models_has_a_rule():
    assert set(LOGICAL_AXES) == set(RULES)
    assert {axis for axis in RULES.values() if axis} <= set(MESH_AXES)


def test_mesh_sizes():
    assert parse_mesh("data=-1", 8) == dict(data=8, fsdp=1, tensor=1, sequence=1)
    assert parse_mesh("data=2, tensor=-1", 8) == dict(data=2, fsdp=1, tensor=4, sequence=1)
    assert parse_mesh("", 1) == dict(data=1, fsdp=1, tensor=1, sequence=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=3", "needs 3 x 1 x 1 x 1 devices, but 8 were found"),
        ("data=3,fsdp=-1", "needs 3 x -1 x 1 x 1 devices"),
        ("rows=8", "found 'rows=8'"),
        ("data=0", "found 'data=0'"),
        ("data=two", "found 'data=two'"),
        ("data=-1,fsdp=-1", "only one axis can be -1"),
    ],
)
def test_meshes_that_do_not_fit(text, message):
    with pytest.raises(RunError, match=message):
        parse_mesh(text, 8)


def test_a_size_that_the_mesh_does_not_divide_stays_whole():
    mesh = jax.make_mesh((1, 2, 4, 1), MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    spec = jax.sharding.PartitionSpec("vocab", "embed")
    assert mesh_sharding(mesh, spec, (30_522, 128)).spec == jax.sharding.PartitionSpec(None, "fsdp")
    assert mesh_sharding(mesh, spec, (30_524, 128)).spec == jax.sharding.PartitionSpec("tensor", "fsdp")


def sizes():
    first = {}
    for name, family in presets().items():
        first.setdefault(family.title, (name, family))
    return first.values()


@pytest.mark.parametrize(("name", "family"), sizes(), ids=lambda value: value if isinstance(value, str) else "")
def test_no_matrix_of_a_model_is_whole_on_every_device(name, family):
    """Each is divided along fsdp or tensor; an axis with a rule is whole only if its size cannot be divided."""
    mesh = make_mesh("fsdp=2,tensor=2,sequence=2")
    model = family.architectures[0].build(family.config.preset(name))
    boxed = jax.eval_shape(partial(init_params, model), jax.random.key(0))
    specs, shapes = logical_specs(boxed), nn.unbox(boxed)
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    undivided = set()
    for (path, leaf), spec in zip(leaves, jax.tree.leaves(specs), strict=True):
        axes = mesh_sharding(mesh, spec, leaf.shape).spec
        sides = [axis for axis in spec if axis != "layers"]
        if len(sides) > 1 and not any(axes):
            assert set(sides) & {"labels", "head_dim"}, (jax.tree_util.keystr(path), leaf.shape, spec)
        for axis, size, mesh_axis in zip(spec, leaf.shape, axes, strict=True):
            if axis is not None and RULES[axis] is not None and mesh_axis is None:
                assert size % 2, (jax.tree_util.keystr(path), leaf.shape, spec)
                undivided.add(axis)
    assert undivided <= ({"heads"} if name.endswith("vit-tiny") else {"vocab"})
