"""What trains, what each parameter's rate is, and when a run ends early."""

import dataclasses
import shutil
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from bestiary.data.json_files import read_object_lines
from bestiary.train import loop
from bestiary.train.checkpoint import Checkpoints, restore_from
from bestiary.train.config import FREE, LoopConfig, OptimConfig, Optimizer, ParallelConfig
from bestiary.train.errors import RunError
from bestiary.train.learner import gradient_step, make_learner
from bestiary.train.loop import Best, Training
from bestiary.train.machine import speed
from bestiary.train.machine.chips import CHIPS
from bestiary.train.optim.schedule import schedule
from bestiary.train.run import start_run
from bestiary.train.sharding import Replicas, start_parallelism

STEPS = 8
OPTIM = OptimConfig(learning_rate=0.1, warmup=0.0, schedule="constant", weight_decay=0.0)


class Line(nn.Module):
    """y = x·kernel + bias, over two stacked layers that are summed."""

    @nn.compact
    def __call__(self, x):
        normal = nn.initializers.normal(1.0)
        kernel = self.param("kernel", nn.with_logical_partitioning(normal, ("layers", "embed")), (2, 3))
        bias = self.param("bias", nn.with_logical_partitioning(normal, ("labels",)), (1,))
        return x @ kernel.sum(0) + bias


def learner_of(**options):
    rate = schedule(OPTIM, [(STEPS, None)])
    return make_learner(
        lambda key: Line().init(key, jnp.zeros((1, 3)))["params"], optim=OPTIM, rate=rate, seed=0, **options
    )


def step_of(learner):
    def step(state, batch, replicas):
        count = replicas.sum(jnp.float32(batch["x"].shape[0]))

        def loss(params, part):
            total = jnp.square(Line().apply({"params": params}, part["x"]) - part["y"]).sum()
            return total / count, total

        state, total, norm = gradient_step(state, batch, replicas, learner=learner, loss=loss)
        return state, {"loss": (total, count), "gradient_norm": (norm, 1.0), "tokens": (count, 1.0)}

    return step


def batch_of(number):
    x = np.random.default_rng(number).normal(size=(8, 3)).astype(np.float32)
    return {"x": x, "y": x.sum(1)}


def test_only_what_trains_has_state_and_moves():
    learner = learner_of(trains=lambda names: names[-1] == "bias")
    before = learner.make()
    assert {leaf.shape for leaf in jax.tree.leaves(before.opt_state)} == {(), (1,)}
    after, _ = step_of(learner)(before, jax.tree.map(jnp.asarray, batch_of(0)), Replicas())
    np.testing.assert_array_equal(after.params["kernel"], before.params["kernel"])
    assert (after.params["bias"] != before.params["bias"]).all()
    with pytest.raises(RunError, match="Nothing to train"):
        learner_of(trains=lambda names: False)


def test_rates_of_single_parameters():
    """Adam's first update is the rate itself in every entry; a stacked layer's factor is its own."""
    layers = jnp.asarray([[0.5], [0.0]])
    learner = learner_of(scales=lambda names: layers if names[-1] == "kernel" else 2.0)
    before = learner.make()
    after, _ = step_of(learner)(before, jax.tree.map(jnp.asarray, batch_of(0)), Replicas())
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a - b)), after.params, before.params)
    np.testing.assert_allclose(moved["kernel"], np.broadcast_to([[0.05], [0.0]], (2, 3)), rtol=1e-3)
    np.testing.assert_allclose(moved["bias"], 0.2, rtol=1e-3)


@pytest.mark.parametrize("optimizer", get_args(Optimizer))
def test_every_optimisers_state_is_sharded_saved_and_read_again(optimizer, tmp_path):
    """Moments lie where their parameter lies; what has another shape is replicated."""

    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = ("layers", "embed", "heads", "head_dim")
            normal = nn.initializers.normal(1.0)
            kernel = self.param("kernel", nn.with_logical_partitioning(normal, axes), (2, 4, 2, 3))
            return jnp.einsum("be,nehd->bnhd", x, kernel)

    optim = dataclasses.replace(OPTIM, optimizer=optimizer)
    learner = make_learner(
        lambda key: Layers().init(key, jnp.zeros((1, 4)))["params"], optim=optim, rate=lambda _: jnp.float32(1), seed=0
    )
    parallelism = start_parallelism(ParallelConfig(mesh="fsdp=4,tensor=2"))
    state = parallelism.initialise(learner.make, learner.specs)
    shape, place = state.params["kernel"].shape, state.params["kernel"].sharding
    assert place.spec == P(None, "fsdp", "tensor", None)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1]
    assert moments
    assert all(leaf.sharding == place for leaf in moments if leaf.shape == shape)
    assert all(leaf.sharding.is_fully_replicated for leaf in moments if leaf.shape != shape)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, report=print)
    with closing(checkpoints):
        checkpoints.save(1, state, {})
        checkpoints.finish()
        restored = checkpoints.restore(parallelism.abstract(learner.make, learner.specs))
    assert restored is not None
    jax.tree.map(np.testing.assert_array_equal, restored.state, state)


class Numbers:
    def __init__(self):
        self.at = 0

    def __next__(self):
        self.at += 1
        return batch_of(self.at)

    def get_state(self):
        return self.at

    def set_state(self, state):
        self.at = state


@dataclass(frozen=True)
class Settings:
    out: Path
    seed: int = 0
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(evaluate_every=1, checkpoint_every=2))
    parallelism: ParallelConfig = field(default_factory=ParallelConfig)
    resume_from: Path | None = None


class Growing(Numbers):
    """Batches of which every third has another shape."""

    def __next__(self):
        batch = super().__next__()
        return {name: np.concatenate([values] * 2) for name, values in batch.items()} if self.at % 3 == 0 else batch


def run_once(folder, values, kept, patience, counts_after=0, batches=Numbers, **settings):
    """Train with an evaluation after every step, which reads its value from a list."""
    learner = learner_of()

    def evaluate(state, stop):
        return {"score": values[int(np.asarray(state.step)) - 1]}

    with start_run(Settings(folder, **settings), FREE) as run:

        def keep(number, state):
            kept.append(number)
            run.keep_best(number, state)

        return run.fit(
            Training(
                learner=learner,
                step=step_of(learner),
                steps=STEPS,
                batches=batches(),
                evaluate=evaluate,
                shown=("loss",),
                counted={"tokens": "tokens/s"},
                best=Best("score", patience, keep, counts_after),
            )
        )


def test_ends_when_no_evaluation_is_better(tmp_path):
    kept: list[int] = []
    fitted = run_once(tmp_path / "run", [1.0, 3.0, 2.0, 3.0, 2.5, 9.0, 9.0, 9.0], kept, patience=3)
    assert (fitted.step, fitted.best, kept) == (5, (2, 3.0), [1, 2])
    again = run_once(tmp_path / "run", [], kept, patience=3)  # the same command, after the end
    assert (again.step, again.best, kept) == (5, (2, 3.0), [1, 2])
    assert again.totals == fitted.totals == {"tokens": 40.0}


def test_no_step_that_compiles_counts_towards_the_rates(tmp_path, capsys):
    fitted = run_once(tmp_path / "run", [0.0] * STEPS, [], patience=0, batches=Growing)
    assert fitted.totals == {"tokens": 6 * 8 + 2 * 16}
    assert fitted.timed == {"tokens": 5 * 8 + 1 * 16}, "all but the first of each shape"
    assert 0 < fitted.compiling < 60
    said = capsys.readouterr().err
    assert said.count("compiled the training step for ") == 2
    assert "compiled the training step for rows of 16x3 in " in said
    lines = read_object_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["total_tokens"] for line in lines if "total_tokens" in line] == [80.0]


def chip(_):
    """Stands in for a chip whose peak is known, of one operation a second."""
    return CHIPS["v5e"]._replace(flops=1.0)


@pytest.mark.parametrize("parallel", ["mesh", "pmap"])
def test_operations_are_those_of_each_shape(parallel, tmp_path, monkeypatch):
    """A batch of twice the rows has twice the operations, on however many devices."""
    monkeypatch.setattr(speed, "chip_of", chip)
    settings = {"parallelism": ParallelConfig(parallel=parallel), "loop": LoopConfig(log_every=1)}
    run_once(tmp_path / "run", [0.0] * STEPS, [], patience=0, batches=Growing, **settings)
    lines = read_object_lines(tmp_path / "run" / "speeds.jsonl")
    found = {line["step"]: line["mfu"] * line["seconds_per_step"] * jax.device_count() for line in lines}
    assert sorted(found) == [2, 4, 5, 6, 7, 8], "all but the first of each shape"
    assert found[2] >= 2 * 2 * 8 * 3, "two products of [8, 3] and [3, 1] at least, forward and backward"
    for step in found:
        assert found[step] == pytest.approx(found[2] * (2 if step % 3 == 0 else 1))


def test_an_evaluation_that_failed_is_made_up_for(tmp_path):
    """The state is saved in front of it: nothing has to be trained again."""
    with pytest.raises(IndexError):
        run_once(tmp_path / "run", [1.0, 2.0], [], patience=0)
    kept: list[int] = []
    again = run_once(tmp_path / "run", [1.0, 2.0, 3.0, *[0.0] * 5], kept, patience=0)
    assert (again.best, kept) == ((3, 3.0), [3])
    lines = read_object_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval/score" in line] == list(range(1, STEPS + 1))


def test_a_trace_ends_with_the_run(tmp_path, monkeypatch, capsys):
    """One that the run's end, or an error, cuts short too."""
    calls: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    monkeypatch.setattr(loop, "PROFILED_FROM", 3)
    with pytest.raises(IndexError):
        run_once(tmp_path / "run", [1.0] * 4, [], patience=0, loop=LoopConfig(evaluate_every=1, profile=4))
    assert calls == ["start", "stop"]
    assert "steps from 3 on are traced in " in capsys.readouterr().err


def test_patience_begins_when_evaluations_count(tmp_path):
    values = [1.0, 0.5, 0.5, 0.5, 0.5, 2.0, 1.0, 1.0]
    assert run_once(tmp_path / "soon", values, [], patience=2).step == 3
    assert run_once(tmp_path / "late", values, [], patience=2, counts_after=4).step == 8


def test_best_is_remembered_over_a_restart(tmp_path):
    """The checkpoint of step 4 is lost, so the run goes on from step 2 with what was best then."""
    values = [1.0, 5.0, 2.0, 6.0, 1.0, 1.0, 1.0, 1.0]
    kept: list[int] = []
    whole = run_once(tmp_path / "run", values, kept, patience=0)
    assert (whole.step, whole.best, kept) == (STEPS, (4, 6.0), [1, 2, 4])
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=2, report=print)
    assert checkpoints.restore(jax.eval_shape(lambda: whole.state)).extra_state["best"] == [4, 6.0]
    checkpoints.close()


def test_the_best_checkpoints_are_kept_besides_the_newest(tmp_path):
    values = [1.0, 5.0, 2.0, 6.0, 1.0, 1.0, 1.0, 1.0]
    loop = LoopConfig(keep=1, keep_best=2, evaluate_every=1, checkpoint_every=3)
    run_once(tmp_path / "run", values, [], patience=0, loop=loop)
    steps = sorted(int(path.stem) for path in (tmp_path / "run" / "checkpoints").glob("*.json"))
    assert steps == [2, 4, 8]
    assert steps == sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.is_dir())


def test_a_checkpoint_of_another_optimiser_is_refused(tmp_path):
    whole = run_once(tmp_path / "run", [1.0] * STEPS, [], patience=0)
    other = whole.state.replace(opt_state=(whole.state.opt_state, {"running_mean": whole.state.params}))
    with pytest.raises(RunError, match=r"step 8: the arrays belong to another model or optimiser"):
        restore_from(tmp_path / "run", jax.eval_shape(lambda: other), print)


def test_a_checkpoint_that_cannot_be_resumed_from_leaves_no_run_behind(tmp_path):
    run_once(tmp_path / "run", [1.0] * STEPS, [], patience=0)
    for named, error in ((tmp_path / "none", FileNotFoundError), (tmp_path / "run", RunError)):
        with pytest.raises(error):
            run_once(tmp_path / "other", [], [], patience=0, resume_from=named)
        assert not (tmp_path / "other").exists()


def test_its_own_checkpoints_come_before_the_named_one(tmp_path):
    """A run that began from another's checkpoint needs that no more once it has its own."""
    run_once(tmp_path / "first", [1.0] * STEPS, [], patience=0)
    named = tmp_path / "first" / "checkpoints" / "6"
    run_once(tmp_path / "second", [1.0] * STEPS, [], patience=0, resume_from=named)
    shutil.rmtree(tmp_path / "first")
    assert run_once(tmp_path / "second", [], [], patience=0, resume_from=named).step == STEPS
