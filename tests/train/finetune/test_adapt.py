"""LoRA and BitFit in a run: what trains, what has optimiser state, and what is left behind."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary import models
from bestiary.models.checkpoints.peft import load_lora
from bestiary.models.checkpoints.tables import flatten
from bestiary.models.encoders.albert import FAMILY as ALBERT
from bestiary.models.encoders.albert import AlbertConfig
from bestiary.models.encoders.bert import FAMILY, BertConfig
from bestiary.models.lora import LoraError, merge_lora
from bestiary.train.adapt.adapters import AdaptedModel, adaptation
from bestiary.train.adapt.layer_rates import layer_rates, parameter_depths
from bestiary.train.cli import main
from bestiary.train.config import AdaptConfig, OptimConfig
from bestiary.train.errors import RunError
from bestiary.train.finetune.config import FinetuneConfig
from bestiary.train.finetune.model import check_model
from bestiary.train.learner import count_parameters, make_learner
from bestiary.train.optim.schedule import schedule

MODEL = FAMILY.build(
    "classification", BertConfig(vocab_size=29, width=8, layers=3, heads=2, feed_forward=12, positions=16, num_labels=2)
)
IDS = jnp.zeros((1, 4), jnp.int32)
SHAPES = jax.eval_shape(MODEL.init, jax.random.key(0), IDS)["params"]


def learner_of(config: AdaptConfig) -> Any:
    plan = adaptation(config, MODEL, SHAPES)
    assert plan is not None
    optim = OptimConfig()
    return make_learner(
        lambda key: AdaptedModel(MODEL, plan).init(key, IDS)["params"],
        optim=optim, rate=schedule(optim, [(8, None)]), seed=0, trains=plan.trains,
    )  # fmt: skip


HEAD = 8 * 8 + 8 + 8 * 2 + 2  # pooler and classifier


@pytest.mark.parametrize(
    ("config", "trained"),
    [
        (AdaptConfig(lora_rank=2), 3 * 2 * (8 * 2 + 2 * 8) + HEAD),
        (AdaptConfig(lora_rank=3, lora_targets=("feed-forward",)), 3 * 2 * (8 * 3 + 3 * 12) + HEAD),
        # four projections, two maps of the feed-forward, two norms a layer; the embeddings' norm
        (AdaptConfig(bitfit=True), 3 * (4 * 8 + 12 + 8 + 2 * 8) + 8 + HEAD),
    ],
)
def test_only_what_trains_has_optimiser_state(config: AdaptConfig, trained: int):
    learner = learner_of(config)
    shapes = learner.shapes()
    masked = zip(jax.tree.leaves(shapes.params), jax.tree.leaves(learner.trains), strict=True)
    assert count_parameters([leaf for leaf, here in masked if here]) == trained
    moments = [leaf for leaf in jax.tree.leaves(shapes.opt_state) if leaf.ndim]
    assert count_parameters(moments) == 2 * trained


def test_bitfit_trains_biases_and_the_head():
    plan = adaptation(AdaptConfig(bitfit=True), MODEL, SHAPES)
    assert plan is not None
    names = [path for path, _ in flatten(SHAPES)]
    inside = {path[-1] for path in names if plan.trains(path) and path[:2] == ("encoder", "layers")}
    assert inside == {"bias"}
    outside = {path[:2] for path in names if plan.trains(path) and path[:2] != ("encoder", "layers")}
    assert outside == {
        ("encoder", "embeddings"),
        ("encoder", "pooler"),
        ("classifier", "kernel"),
        ("classifier", "bias"),
    }
    assert plan.trains(("encoder", "embeddings", "norm", "bias"))
    assert not plan.trains(("encoder", "embeddings", "word", "embedding"))


def test_all_of_it_trains_unless_something_else_is_asked_for():
    assert adaptation(AdaptConfig(), MODEL, SHAPES) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora_rank": -1}, "--lora-rank is -1"),
        ({"lora_rank": 2, "bitfit": True}, "mutually exclusive"),
        ({"lora_rank": 2, "lora_dropout": 1.5}, "dropout is 1.5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: Any, said: str):
    with pytest.raises((RunError, LoraError), match=said):
        AdaptConfig(**settings)


def test_a_model_without_biases_is_named():
    kernels = {"encoder": {"layers": {"query": {"kernel": np.zeros(3)}}}}
    with pytest.raises(RunError, match="the layers of BERT have no biases to train"):
        adaptation(AdaptConfig(bitfit=True), MODEL, kernels)


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sst2(tmp_path_factory, made_up) -> Path:
    folder = tmp_path_factory.mktemp("glue") / "SST-2"
    folder.mkdir()
    draw = random.Random(0)
    for split in ("train", "dev"):
        rows = "".join(f"{text} bast\t{draw.randrange(2)}\n" for text in made_up(24, seed=len(split)))
        (folder / f"{split}.tsv").write_text(f"sentence\tlabel\n{rows}")
    return folder


def run(encoder: Path, sst2: Path, out: Path, *more: str) -> int:
    sizes = ["--steps", "4", "--batch-size", "8", "--max-length", "24", "--learning-rate", "1e-2", "--log-every", "1"]
    return main(["finetune", "sst2", "--data", str(sst2), "--model", str(encoder), "--out", str(out), *sizes, *more])


def test_a_run_leaves_its_adapters_beside_the_merged_model(sentence_encoder, sst2, tmp_path):
    flags = ["--lora-rank", "2", "--lora-targets", "query", "inner", "--lora-dropout", "0.2", "--dropout", "0"]
    assert run(sentence_encoder, sst2, tmp_path / "run", *flags) == 0
    whole = models.load(tmp_path / "run" / "model")
    base = models.load(sentence_encoder, head="classification")
    params, config = load_lora(tmp_path / "run" / "adapter", base.model, base.params)
    assert (config.rank, config.alpha, config.dropout) == (2, 16.0, 0.2)
    merged = merge_lora(params, config)[0]
    jax.tree.map(np.testing.assert_array_equal, merged, whole.params)
    changed = {
        path
        for path, leaf in flatten(whole.params)
        if path[:2] == ("encoder", "layers") and np.any(leaf != dict(flatten(base.params))[path])
    }
    assert {path[2:] for path in changed} == {("attention", "query", "kernel"), ("feed_forward", "inner", "kernel")}
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    records = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert len({json.loads(line).get("loss") for line in records.splitlines()}) > 3


def test_a_target_that_matches_nothing_ends_the_run_before_it_begins(sentence_encoder, sst2, tmp_path, capsys):
    assert run(sentence_encoder, sst2, tmp_path / "run", "--lora-rank", "2", "--lora-targets", "q_proj") == 1
    said = capsys.readouterr().err
    assert "the target 'q_proj' is no linear map of this model" in said
    assert "encoder.layers.attention.query" in said
    assert not (tmp_path / "run").exists()


def test_layers_that_share_parameters_have_one_rate_and_are_frozen_together(tmp_path: Path):
    """ALBERT: four layers in two groups. A group has the rate of its last layer."""
    sizes = dict(vocab_size=29, width=8, layers=4, heads=2, feed_forward=12, positions=16, embedding_size=4)
    config = AlbertConfig(**sizes, groups=2)
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    depths = parameter_depths(ALBERT.build("classification", config))

    def settings(**changes: Any) -> FinetuneConfig:
        return FinetuneConfig(model=tmp_path, out=tmp_path / "run", **changes)

    _, scales = layer_rates(settings(layer_decay=0.5), depths)
    assert scales is not None
    assert scales(("encoder", "layers", "feed_forward", "inner", "kernel")).ravel().tolist() == [0.5**3, 0.5]
    assert scales(("encoder", "project", "kernel")) == scales(("encoder", "embeddings", "norm", "scale")) == 0.5**5
    assert scales(("classifier", "kernel")) == 1
    task: Any = SimpleNamespace(head="classification", max_length=8)
    for frozen in (0, 2, 4):
        check_model(settings(freeze_layers=frozen), task)
    for frozen in (1, 3):
        with pytest.raises(RunError, match=f"--freeze-layers is {frozen}, .* share their parameters .* Freeze 2 or 4"):
            check_model(settings(freeze_layers=frozen), task)
