"""Plans: what is read out of a compiled program, and that every training command can be planned."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bestiary.data import load_tokenizer
from bestiary.kernels import splitting
from bestiary.models import load
from bestiary.models.layers.stack import run_layers
from bestiary.train.cli import COMMANDS, RESUMING, config_of, main
from bestiary.train.errors import RunError
from bestiary.train.machine.chips import CHIPS, Chip, Target, parse_target
from bestiary.train.machine.operations import operations
from bestiary.train.plan.arguments import divide
from bestiary.train.plan.config import PlanConfig
from bestiary.train.plan.estimate import gib, make_plan
from bestiary.train.plan.plan import Command, Planner, candidates, changed, largest_stage, pmap_line, setting
from bestiary.train.plan.planned import PlannedPmap, Step
from bestiary.train.plan.program import Program
from bestiary.train.plan.stand_ins import StandIns
from bestiary.train.sharding import make_mesh

HERE = Chip("CPU", "cpu", 1e12, 1 << 34, 1e11, 1e10, 1e9, 1, "nowhere")
LAYERS, ROWS, WIDTH, INNER = 3, 64, 32, 128


def layers(remat: bool):
    """Gradient of a scan of two products, over a mesh of 4 x 2."""

    def one(hidden, weights):
        return jax.nn.relu(hidden @ weights[0]) @ weights[1], None

    body = jax.checkpoint(one, prevent_cse=False) if remat else one

    def loss(weights, hidden):
        return jax.lax.scan(body, hidden, weights)[0].sum()

    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def array(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

    weights = array((LAYERS, WIDTH, INNER), None, None, "tensor"), array((LAYERS, INNER, WIDTH), None, "tensor")
    given = weights, array((ROWS, WIDTH), "data")
    return jax.jit(jax.grad(loss)).trace(*given), given


FORWARD = 2 * 2 * ROWS * WIDTH * INNER * LAYERS


def test_a_program_counts_loops_and_names_the_axes_of_collectives():
    found = Program(layers(remat=False)[0].lower().compile().as_text(), {"data": 4, "tensor": 2}).totals
    assert found.flops == 3 * FORWARD / 8  # forward, and two products backward; on each of 8 devices
    kinds = {(one.kind, one.axes) for one in found.collectives}
    assert kinds == {("all-reduce", ("data",)), ("all-reduce", ("tensor",))}
    gradients = [one for one in found.collectives if one.axes == ("data",)]
    assert sum(one.bytes * one.runs for one in gradients) == 2 * LAYERS * WIDTH * INNER / 2 * 4
    assert gradients[0].sent == pytest.approx(2 * 3 / 4 * gradients[0].bytes * gradients[0].runs)
    assert 0 < found.bytes < 1e8


def test_recomputed_operations_are_not_needed():
    assert operations(layers(remat=False)[0].jaxpr.jaxpr) == 3 * FORWARD
    assert operations(layers(remat=True)[0].jaxpr.jaxpr) == pytest.approx(3 * FORWARD, rel=0.12)
    compiled = layers(remat=True)[0].lower().compile().as_text()
    assert Program(compiled, {"data": 4, "tensor": 2}).totals.flops > 3 * FORWARD / 8


class Products(nn.Module):
    """A layer of two products."""

    width: int
    inner: int

    @nn.compact
    def __call__(self, hidden: jax.Array, *, deterministic: bool, scale: float = 1.0) -> jax.Array:
        del deterministic
        up = self.param("up", nn.initializers.normal(), (self.width, self.inner))
        down = self.param("down", nn.initializers.normal(), (self.inner, self.width))
        return hidden + scale * jax.nn.relu(hidden @ up) @ down


class Stack(nn.Module):
    """Layers on embeddings."""

    width: int
    inner: int
    kinds: tuple[float, ...] | None

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        hidden = self.param("table", nn.initializers.normal(), (40, self.width))[ids]
        kinds = None if self.kinds is None else [{"scale": scale} for scale in self.kinds]
        how = {"count": 2, "scan": True, "remat": False, "deterministic": True}
        return run_layers(Products(self.width, self.inner), hidden, kinds=kinds, **how)[0]


@pytest.mark.parametrize("kinds", [None, (1.0, 0.5)])
def test_rows_stay_divided_where_parameters_are_divided_too(kinds):
    """Even if the ids are not. T5's are corrupted on the device, and the compiler exchanged all rows' activations."""
    mesh = make_mesh("fsdp=8")
    rows, width, inner = 512, 32, 64
    model = Stack(width, inner, kinds)

    def loss(weights, ids):
        with splitting(mesh, batch=("data", "fsdp")):
            return (model.apply({"params": weights}, ids) ** 2).sum()

    def shape(dtype, *sides, spec):
        return jax.ShapeDtypeStruct(sides, dtype, sharding=NamedSharding(mesh, spec))

    weights = {
        "table": shape(jnp.float32, 40, width, spec=P(None, "fsdp")),
        "Products_0": {
            "up": shape(jnp.float32, 2, width, inner, spec=P(None, "fsdp")),
            "down": shape(jnp.float32, 2, inner, width, spec=P(None, None, "fsdp")),
        },
    }
    ids = shape(jnp.int32, rows, 4, spec=P())
    compiled = jax.jit(jax.grad(loss)).trace(weights, ids).lower().compile()
    found = Program(compiled.as_text(), dict(mesh.shape)).totals.collectives
    assert max(one.bytes for one in found) < 4 * rows * 4 * width / 4, found


def test_a_product_of_batches_that_became_a_convolution_is_counted_without_padding():
    text = """HloModule m
ENTRY %main (a: f32[4,8,16], b: f32[4,16,32]) -> f32[8,4,32] {
  %a = f32[4,8,16]{2,1,0} parameter(0)
  %b = f32[4,16,32]{2,1,0} parameter(1)
  ROOT %c = f32[8,4,32]{2,1,0} convolution(%a, %b), window={size=4 stride=3 pad=0_0 lhs_dilate=4},\
 dim_labels=0bf_0io->b0f
}
"""
    assert Program(text, {"data": 1}).totals.flops == 2 * 4 * 8 * 16 * 32


COMMAND_LINES = {
    "pretrain": "pretrain --model bert-tiny --batch-tokens 4096",
    "squad": "finetune squad --model bert-tiny --batch-size 8 --max-length 64 --max-question 16 --doc-stride 16",
    "translate": "translate train --preset transformer-tiny --batch-tokens 2048",
    "multitask": "multitask train --batch-size 8 --config",
    "images": "images train --parallel pmap --model vit-tiny --batch-size 8 --image-size 32 --patch-size 8 --layers 2",
}


TASKS = """
[text]
model = "bert-tiny"
width = 32
layers = 1
heads = 4
[decoder]
width = 32
layers = 1
heads = 4
feed_forward = 64
[tasks.first]
kind = "text-classification"
data = "{0}/SST-2"
glue = "sst2"
[tasks.second]
kind = "text-classification"
data = "{0}/SST-2"
glue = "sst2"
"""


def planner(line: str, folder: Path) -> Planner:
    words = tuple(line.split())
    name = max((known for known in COMMANDS if words[: len(known)] == known), key=len)
    command = COMMANDS[name]
    module, _, attribute = command.config.partition(":")
    found = __import__(f"bestiary.train{module}", fromlist=[attribute])
    options = getattr(found, attribute)
    runs_in = __import__(f"bestiary.train{command.runs_in or module}", fromlist=["main"])
    stand_ins = StandIns(name, words[len(name) :], options, folder)
    settings = config_of(name, stand_ins.arguments())
    target = Target("here:8", HERE, jax.devices(), 1)
    return Planner(target, Command(name, words[len(name) :], options, None, runs_in.main), settings, folder)  # type: ignore


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_every_training_command_is_traced_without_data_or_weights(name, tmp_path, repository):
    (tmp_path / "tasks.toml").write_text(TASKS.format(repository / "docs" / "examples"))
    made = planner(COMMAND_LINES[name].replace("--config", f"--config {tmp_path / 'tasks.toml'}"), tmp_path / "made")
    steps = made.steps(made.settings)
    assert [step.task for step in steps] == (["first", "second"] if name == "multitask" else [""])
    for step in steps:
        assert operations(step.traced.jaxpr.jaxpr) > 1e7
        assert all(leaf.sharding is not None for leaf in jax.tree.leaves((step.state, step.batch)))
        rows = {leaf.shape[0] for leaf in step.batch.values()}
        assert len(rows) == 1
        assert rows.pop() % 8 == 0


def test_pmap_holds_the_whole_state_on_every_device():
    """Its gradients are added up over all devices, and its operations are those of the mesh."""
    spread = PlannedPmap(make_mesh("data=8", jax.devices()))

    def step(weights, batch, replicas):
        loss, gradient = jax.value_and_grad(lambda w: (batch["x"] @ w).sum())(weights)
        return weights - replicas.sum(gradient), {"loss": replicas.sum(loss)}

    specs = P("embed", "mlp")
    weights = spread.abstract(lambda: jnp.zeros((WIDTH, INNER)), specs)
    index, parts = spread.share(ROWS)
    assert (index, parts) == (0, ROWS)
    batch = spread.shard_batch({"x": np.zeros((1, WIDTH), np.float32)})
    traced = spread.compile_train(step, specs).trace(weights, batch)
    made = Step(traced, "cpu", dict(spread.mesh.shape), SimpleNamespace(params=weights, opt_state=()), batch, ())
    needed = operations(traced.jaxpr.jaxpr)
    assert needed == 2 * 2 * ROWS * WIDTH * INNER
    found, _ = make_plan(made, Target("here:8", HERE, jax.devices(), 1), needed)
    assert found.memory is not None
    assert found.memory.parameters == 4 * WIDTH * INNER
    assert sum(one.bytes * one.runs for one in found.collectives) == pytest.approx(4 * WIDTH * INNER, abs=16)
    assert {one.axes for one in found.collectives} == {("data",)}
    assert f"pmap         {gib(found.memory.peak)} on each device" in pmap_line(found, found)


def test_the_memory_of_a_plan_is_the_compilers():
    traced, (weights, hidden) = layers(remat=False)
    state, batch = SimpleNamespace(params=weights, opt_state=weights), {"input_ids": hidden}
    step = Step(traced, "cpu", {"data": 4, "tensor": 2}, state, batch, ())
    plan, compiled = make_plan(step, Target("here:8", HERE, jax.devices(), 1), 3 * FORWARD)
    report = compiled.memory_analysis()
    assert plan.memory is not None
    assert plan.memory.peak == (
        report.argument_size_in_bytes
        + report.output_size_in_bytes
        - report.alias_size_in_bytes
        + report.temp_size_in_bytes
        + report.generated_code_size_in_bytes
    )
    assert plan.memory.parameters == 2 * LAYERS * WIDTH * INNER * 4 / 2  # divided along tensor
    assert plan.flops * 8 == plan.model_flops
    assert plan.fits
    assert plan.seconds["at_least"] <= plan.seconds["at_most"]
    small = Target("here:8", HERE._replace(memory=plan.memory.peak - 1), jax.devices(), 1)
    assert not make_plan(step, small, 3 * FORWARD)[0].fits


def test_a_checkpoint_of_holes_loads(tmp_path):
    stand_ins = StandIns(("finetune",), ["mrpc", "--model", "bert-tiny"], None, tmp_path)
    arguments = stand_ins.arguments()
    folder = Path(arguments[arguments.index("--model") + 1])
    loaded = load(folder, head="encoder")
    assert not np.any(loaded.params["embeddings"]["word"]["embedding"])
    assert loaded.config.vocab_size == 30_522
    assert folder.joinpath("model.safetensors").stat().st_blocks * 512 < 1 << 20


def test_the_flags_of_a_plan_are_told_from_those_of_the_command():
    text = "translate train --source a.en --target a.de --target v5e:4x4 --search --json p.json --remat"
    assert divide(text.split()) == (
        ["--target", "v5e:4x4", "--search", "--json", "p.json"],
        ["translate", "train", "--source", "a.en", "--target", "a.de", "--remat"],
    )
    assert divide(["pretrain", "--target=h200:8"]) == (["--target=h200:8"], ["pretrain"])
    text = "--target v5e:4x4 translate train --target a.de"
    assert divide(text.split()) == (["--target", "v5e:4x4"], ["translate", "train", "--target", "a.de"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("finetune glue", " finetune glue is several runs: plan one of its tasks, as finetune mrpc."),
        ("finetune glue --as-text", " finetune glue is several runs: plan one of its tasks, as finetune mrpc."),
        ("translate run", ""),
        ("images embed", ""),
        ("pretran", " Did you mean 'pretrain'?"),
    ],
)
def test_commands_that_are_not_planned(line, said, capsys):
    assert main(["plan", *line.split(), "--target", "v5e:2x2"]) == 1
    assert capsys.readouterr().err.endswith(f"the commands are {', '.join(RESUMING)}.{said}\n")


def test_attention_that_needs_the_gpu_is_refused(tmp_path):
    made = planner("pretrain --model bert-tiny --attention cudnn", tmp_path)
    with pytest.raises(RunError, match="--attention cudnn: only a machine with such a GPU compiles it; plan with hop"):
        made.steps(made.settings)


def test_what_a_search_does_not_make_is_refused():
    with pytest.raises(RunError, match="--chart is of a single plan: leave out --search"):
        PlanConfig("v5e:2x2", search=True, chart=Path("chart.png"))


def test_the_largest_batches_of_a_run_are_planned():
    arguments = ["--phases", "128:900", "512:100", "--batch-ramp", "1024:10", "--batch-tokens", "4096", "--out", "run"]
    settings, (remark,) = largest_stage(config_of(("pretrain",), arguments))
    (stage,) = settings.plan
    assert (stage.rows, stage.length) == (8, 512)
    assert remark == "the largest of 3 kinds of batches: 8 rows of 512 tokens"
    assert largest_stage(settings) == (settings, [])


def test_a_vocabulary_of_words_is_as_large_as_the_models(tmp_path):
    stand_ins = StandIns(("pretrain",), ["--model", "elmo-small", "--vocab-size", "2000"], None, tmp_path)
    arguments = stand_ins.arguments()
    assert load_tokenizer(arguments[arguments.index("--tokenizer") + 1]).vocab_size == 2000
    with pytest.raises(RunError, match="--model openai-gpt: its kind of tokenizer is not trained here; give --tok"):
        StandIns(("pretrain",), ["--model", "openai-gpt"], None, tmp_path / "other").arguments()


def test_targets():
    assert parse_target("2xv5e:16x16") == (2, "v5e", "16x16")
    assert parse_target("h200:8") == (1, "h200", "8")
    for text in ("v9:2x2", "v5e", "v5e:axb", "2x"):
        with pytest.raises(RunError, match=r"expected CHIP:TOPOLOGY with a chip of v4, v5e"):
            parse_target(text)
    assert all(chip.source for chip in CHIPS.values())


def test_candidates_of_a_search_multiply_to_the_devices():
    meshes = {mesh for mesh, _, _ in candidates(16, 1)}
    assert "data=2,fsdp=8" in meshes
    for mesh in meshes:
        assert np.prod([int(part.split("=")[1]) for part in mesh.split(",")]) == 16


def test_settings_are_changed_wherever_they_are(tmp_path):
    made = planner("finetune mrpc --model bert-tiny", tmp_path)
    for name, value in (("remat", True), ("accumulate", 2), ("mesh", "fsdp=8"), ("attention", "xla")):
        assert setting(changed(made.settings, name, value), name) == value
