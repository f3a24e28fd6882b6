"""Pretraining with a memory: what a step sees of the one before, over devices, and after an interruption."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.models.decoders.transformer_xl import TransformerXLConfig, TransformerXLModel
from bestiary.models.registry import init_params
from bestiary.train.cli import main
from bestiary.train.config import OptimConfig
from bestiary.train.learner import make_learner
from bestiary.train.pretrain.loop import train_step
from bestiary.train.pretrain.streams.causal_memory import NextTokensWithMemory
from bestiary.train.sharding import Parallelism, PmapParallelism, Replicas, make_mesh

ROWS, LENGTH = 8, 6
OBJECTIVE = NextTokensWithMemory(None, True, ROWS, 9)  # pyright: ignore[reportArgumentType]
MODEL = TransformerXLModel(
    TransformerXLConfig(
        vocab_size=23, cutoffs=(5, 11), divisor=1, width=16, embedding_size=16, layers=2, heads=2, head_size=6,
        feed_forward=20, dropout=0.1, attention_dropout=0.1,
    )
)  # fmt: skip
LEARNER = make_learner(
    partial(init_params, MODEL),
    optim=OptimConfig(learning_rate=1e-2),
    rate=lambda _: 1e-2,
    seed=0,
    memory=partial(OBJECTIVE.memory, MODEL),
)


def batches() -> list[dict[str, np.ndarray]]:
    text = np.random.default_rng(0).integers(0, 23, (ROWS, 3 * LENGTH + 1)).astype(np.int32)
    parts = [slice(step * LENGTH, (step + 1) * LENGTH) for step in range(3)]
    ones = {"label_weights": np.ones((ROWS, LENGTH), np.float32), "segment_ids": np.ones((ROWS, LENGTH), np.int32)}
    return [{"input_ids": text[:, part], "labels": text[:, 1:][:, part], **ones} for part in parts]


def trained(parallelism: Parallelism | None, accumulate: int = 1) -> tuple[Any, list[float]]:
    step = partial(train_step, objective=OBJECTIVE, model=MODEL, learner=LEARNER, accumulate=accumulate)
    if parallelism is None:
        state, run = jax.jit(LEARNER.make)(), jax.jit(lambda state, batch: step(state, batch, Replicas()))
    else:
        state = parallelism.initialise(LEARNER.make, LEARNER.specs)
        run = parallelism.compile_train(step, LEARNER.specs)
    losses = []
    for batch in batches():
        placed = batch if parallelism is None else parallelism.shard_batch(batch)
        state, sums = run(state, placed)
        losses.append(float(sums["loss"][0]))
    return jax.device_get(state), losses


@pytest.fixture(scope="module")
def plain() -> tuple[Any, list[float]]:
    return trained(None)


@pytest.mark.parametrize("way", ["accumulate", "mesh", "pmap"])
def test_the_memory_of_each_row_is_its_own(plain: tuple[Any, list[float]], way: str) -> None:
    expected, losses = plain
    made: Any = {
        "accumulate": lambda: trained(None, accumulate=2),
        "mesh": lambda: trained(Parallelism(make_mesh("data=4,fsdp=2"))),
        "pmap": lambda: trained(PmapParallelism()),
    }[way]()
    np.testing.assert_allclose(made[1], losses, rtol=1e-5)
    for name, array in expected.memory.items():
        np.testing.assert_allclose(made[0].memory[name], array, atol=1e-4)
    assert expected.memory["hidden"].shape == (ROWS, 2, 9, 16)
    assert (expected.memory["segment_ids"] == 1).all()


def test_a_step_sees_the_memory_of_the_one_before() -> None:
    params = jax.jit(LEARNER.make)().params
    first, second, _ = ({**batch, "rows": jnp.arange(ROWS, dtype=jnp.uint32)} for batch in batches())
    run = jax.jit(partial(OBJECTIVE.losses_and_memory, MODEL, deterministic=True))
    _, memory = run(params, first, OBJECTIVE.memory(MODEL))
    found, _ = run(params, second, memory)
    ids = np.concatenate([first["input_ids"], second["input_ids"]], axis=1)

    @jax.jit
    def expected() -> Any:
        states: Any = MODEL.apply({"params": params}, ids, method="output_states")
        return MODEL.apply({"params": params}, states[:, LENGTH:], second["labels"], method="token_losses")

    assert float(found["causal"].loss) == pytest.approx(float(expected().sum()), rel=1e-5)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(12):
        lines = [f"Line {n} of text {number}: the sea was calm, and ship {n * number} went by." for n in range(9)]
        (folder / f"{number}.txt").write_text("\n\n".join(lines))
    return folder


def arguments(corpus: Path, out: Path, *more: Any) -> list[str]:
    given = ["pretrain", "--model", "transformer-xl-tiny", "--corpus", corpus, "--vocab-size", 300, "--out", out]
    given += ["--cache", out.parent / "cache", "--sequence-length", 16, "--batch-tokens", 128, "--steps", 6]
    given += ["--memory", 20, "--log-every", 1, "--checkpoint-every", 2, "--keep", 9, "--evaluation-rows", 16]
    return [str(argument) for argument in (*given, "--learning-rate", 3e-3, *more)]


def test_a_run_killed_within_a_stream_ends_with_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(arguments(corpus, whole)) == 0
    results = json.loads((whole / "results.json").read_text())
    assert results["objective"] == "causal+memory"
    assert results["held_out"]["causal_loss"] < np.log(300)
    assert json.loads((whole / "model" / "config.json").read_text())["mem_len"] == 20
    # What a kill after step 5 leaves: the checkpoints up to step 4.
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "model")
    shutil.rmtree(killed / "checkpoints" / "6")
    for name in ("results.json", "checkpoints/6.json"):
        (killed / name).unlink()
    config = json.loads((killed / "config.json").read_text())
    (killed / "config.json").write_text(json.dumps(config).replace(str(whole), str(killed)))
    assert main(arguments(corpus, killed)) == 0
    for name in ("model/model.safetensors", "model/config.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    kept = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
            for run in (whole, killed)]  # fmt: skip
    assert kept[0] == kept[1]


def test_what_does_not_fit_a_memory_is_refused(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    for more, said in (
        (("--model", "gpt2-tiny"), "--memory: it is for --objective causal+memory, found causal"),
        (("--batch-ramp", "256:2"), "one phase and one batch size"),
        (("--objective", "causal"), "Transformer-XL can learn causal+memory"),
    ):
        assert main(arguments(corpus, tmp_path / "run", *more)) == 1
        assert said in capsys.readouterr().err
