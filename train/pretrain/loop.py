"""Pretrain a model on text by an objective, from text to a checkpoint folder.

    bestiary pretrain                          a small ModernBERT on Python's own documentation, minutes on two cores
    bestiary pretrain --corpus books/ --tokenizer DIR --model bert-mini --sequence-length 512 --batch-tokens 65536 \\
        --steps 20000 --mesh data=8 --out runs/mini

An `Objective` (objective.py) defines the task; a `Run` (train/run.py) is everything around the loop.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ...data import evaluation_batches
from ...data.progress import counted
from ...models.heads.losses import PredictionSums, WeightedSum
from ...models.registry import init_params
from ..errors import RunError
from ..learner import (
    Learner,
    MemoryState,
    TrainState,
    WithMemory,
    count_parameters,
    describe_dtype,
    gradient_step,
    on_host,
)
from ..loop import Fitted, Stop, Training
from ..metrics import Meter, Sums
from ..run import Run, start_run
from ..sharding import Parallelism, Replicas
from ..vectors import vectors_weights
from .config import FREE, PretrainConfig, upgrade
from .data import Data, PhasedBatches, make_rows, prepare_data, prepare_tokenizer
from .model import asked_family, describe_tokenizer, make_model, model_config
from .objective import Batch, LossSums, Objective, total
from .objectives import make_objective, with_defaults

MUCH = 0.2
"""Truncated fraction of the text from which a remedy is named."""

MEMORY = "memory/"
"""Begins the names of a memory's arrays among those of a batch, with which they are cut into parts."""

# --- step -------------------------------------------------------------------------------------------------------------


def train_step(
    state: TrainState,
    batch: Batch,
    replicas: Replicas,
    *fixed: Any,
    objective: Objective,
    model: Any,
    learner: Learner,
    accumulate: int,
) -> tuple[TrainState, Sums]:
    """Do one update: minimise the sum of the objective's mean losses over the whole batch."""
    objective = objective.reading(*fixed)
    corrupt_key, dropout_key = jax.random.split(jax.random.wrap_key_data(state.key))
    dropout_key = jax.random.fold_in(dropout_key, state.step)
    tokens = replicas.sum((batch["segment_ids"] > 0).sum())
    batch = corrupt(objective, corrupt_key, batch, replicas)
    weights = replicas.sum(objective.weights(batch))
    before = memory_of(state, batch, replicas)

    def loss(params: Any, part: Batch) -> tuple[jax.Array, Any]:
        memory = {name: part[MEMORY + name] for name in before}
        mode = {"deterministic": False, "rngs": {"dropout": dropout_key}}
        sums, after = objective.losses_and_memory(model, params, part, memory, **mode)
        return total(objective.terms, sums, weights), WithMemory(sums, after) if before else sums

    batch = {**batch, **{MEMORY + name: array for name, array in before.items()}}
    state, sums, norm = gradient_step(state, batch, replicas, learner=learner, loss=loss, accumulate=accumulate)
    one = jnp.float32(1)
    counts = {"gradient_norm": (norm, one), "tokens": (tokens, one)}
    return state, {"loss": (total(objective.terms, sums, weights), one), **prediction_metrics(sums), **counts}


def memory_of(state: TrainState, batch: Batch, replicas: Replicas) -> Batch:
    """Return the memory of a batch's rows; empty without one."""
    return replicas.own(state.memory, len(batch["segment_ids"])) if isinstance(state, MemoryState) else {}


def evaluation_step(
    given: tuple[Any, Batch],
    batch: Batch,
    replicas: Replicas,
    *fixed: Any,
    objective: Objective,
    model: Any,
    key: jax.Array,
) -> tuple[Sums, Batch]:
    """Compute sums over held-out rows, corrupted in the same way every time, and the memory after them.

    Args:
        given: the parameters, and the memory before these rows.
        batch: the rows.
        replicas: the replicas of the step.
        fixed: see `Objective.fixed`.
        objective: the objective.
        model: its model.
        key: key of the corruption.
    """
    params, before = given
    objective = objective.reading(*fixed)
    batch = corrupt(objective, key, batch, replicas)
    memory = replicas.own(before, len(batch["segment_ids"]))
    sums, after = objective.losses_and_memory(model, params, batch, memory, deterministic=True)
    return prediction_metrics(replicas.sum(sums)), replicas.gather(after)


def corrupt(objective: Objective, key: jax.Array, batch: Batch, replicas: Replicas) -> Batch:
    """Return the corrupted batch, with row numbers."""
    rows = replicas.rows(batch["segment_ids"].shape[0])
    return {**objective.corrupt(key, batch), "rows": rows}


def prediction_metrics(sums: LossSums) -> Sums:
    """Return each of an objective's losses, with its accuracy if it has one, and its other means."""
    metrics: Sums = {}
    for name, found in sums.items():
        if isinstance(found, WeightedSum):
            metrics[name] = found
            continue
        metrics[f"{name}_loss"] = (found.loss, found.weight)
        if isinstance(found, PredictionSums):
            metrics[f"{name}_accuracy"] = (found.correct, found.weight)
    return metrics


# --- evaluation -------------------------------------------------------------------------------------------------------


class Evaluation:
    """Evaluation: means over the same held-out rows, corrupted in the same way every time."""

    def __init__(
        self,
        config: PretrainConfig,
        data: Data,
        objective: Objective,
        model: Any,
        parallelism: Parallelism,
        *fixed: Any,
    ):
        last = config.plan[-1]
        index, count = parallelism.share(last.rows)
        self.batches = partial(
            evaluation_batches,
            make_rows(config, data, objective, last.length, "validation"),
            batch_rows=last.rows,
            host_index=index,
            host_count=count,
            rows=config.evaluation_rows or None,
        )
        self.terms = objective.terms
        step = partial(evaluation_step, objective=objective.held_out(), model=model, key=jax.random.key(0))
        self._step, self._parallelism = parallelism.compile_evaluate(step, *fixed), parallelism
        self._memory = partial(objective.memory, model)

    def __call__(self, state: TrainState, stop: Stop) -> dict[str, float] | None:
        meter = Meter()
        memory = self._parallelism.initialise(self._memory, jax.tree.map(lambda _: P(), jax.eval_shape(self._memory)))
        for batch in self.batches():
            sums, memory = self._step((state.params, memory), self._parallelism.shard_batch(batch))
            meter.add(jax.device_get(sums))
            if stop.requested:
                return None
        means = meter.means()
        if not means:
            raise RunError("The held-out rows have nothing to predict: give more --evaluation-rows.")
        found = {term: means.get(f"{term.name}_loss") for term in self.terms}
        return {"loss": sum(term.factor * value for term, value in found.items() if value is not None), **means}


# --- run --------------------------------------------------------------------------------------------------------------


def pretrain(run: Run, config: PretrainConfig) -> int:
    """Pretrain; return the exit status.

    Args:
        run: the run, which has just started.
        config: settings completed by `with_defaults`.
    """
    for phase in config.plan:
        if phase.rows % config.accumulate:
            raise RunError(f"A batch of {phase.rows} rows cannot be computed in {config.accumulate} parts.")
        run.parallelism.share(phase.rows // config.accumulate)
    tokenizer = prepare_tokenizer(config, run.progress)
    objective = make_objective(config, tokenizer)
    architecture = objective.fitted(model_config(config, tokenizer, objective.head))
    run.progress.line(describe_tokenizer(tokenizer, asked_family(config), architecture))
    data = prepare_data(config, tokenizer, run.progress, objective.text)
    model, learner = make_model(config, architecture, objective.head, objective.memory)
    describe(run, config, data, objective, architecture, learner)
    for remark in objective.remarks(model):
        run.progress.line(remark)
    fixed = objective.fixed(run.parallelism)
    evaluate = Evaluation(config, data, objective, model, run.parallelism, *fixed)
    initial = objective.initial(config, model)
    if config.vectors is not None:
        new = partial(init_params, model, jax.random.key(config.seed))
        # "source" is the table of T5 and BART.
        tables: dict[str, list[str]] = dict.fromkeys(("word", "source"), tokenizer.tokens)
        initial = vectors_weights(config.vectors, new, tables)
    training = Training(
        learner=learner,
        step=partial(train_step, objective=objective, model=model, learner=learner, accumulate=config.accumulate),
        steps=sum(phase.steps for phase in config.plan),
        batches=PhasedBatches(config, data, objective, run.parallelism.share),
        evaluate=evaluate,
        shown=("loss", *objective.shown),
        counted={"tokens": "real tokens/s"},
        initial=initial,
        fixed=fixed,
    )
    fitted = run.fit(training)
    if fitted.stopped is None:
        params = on_host(fitted.state.params)
        results = run.results("pretrain", fitted, figures(run, config, data, fitted, count_parameters(params)))
        samples = objective.samples(model, params, next(iter(evaluate.batches())))
        exports = objective.exports(model, params)
        exported = exports.pop("model")
        for name, (other, its_params) in exports.items():
            run.export(name, other, its_params, tokenizer)
        run.finish(*exported, tokenizer, results, samples)
    return fitted.exit_status


def describe(
    run: Run, config: PretrainConfig, data: Data, objective: Objective, architecture: Any, learner: Learner
) -> None:
    """Describe the run and its data."""
    counts, parameters = data.train.counts, count_parameters(learner.shapes().params)
    run.progress.line(
        f"corpus: {counted(counts.documents, 'document')} ({counts.empty_documents:,} empty), "
        f"{counted(counts.sentences, 'sentence')}, {counted(counts.tokens, 'token')}, "
        f"{counts.unknown_tokens:,} of them unknown"
    )
    for length in dict.fromkeys(phase.length for phase in config.plan):
        rows: Any = make_rows(config, data, objective, length)
        statistics = rows.statistics(0, windows=8)
        run.progress.line(f"rows of {length}: {statistics}")
        if statistics.truncated_fraction > MUCH:
            share = f"{statistics.truncated_fraction:.0%}"
            run.progress.line(
                f"{share} of the text is truncated; longer rows, or --objective mlm (no pairs), lose less"
            )
    run.progress.line(
        f"model: {architecture.size_in_words}, {architecture.width} wide, vocabulary {architecture.vocab_size:,}, "
        f"{parameters:,} parameters, in {describe_dtype(architecture.dtype)}, on {run.devices}"
    )


def figures(run: Run, config: PretrainConfig, data: Data, fitted: Fitted, parameters: int) -> dict[str, Any]:
    """Return the part of results.json that is specific to pretraining."""
    records = run.folder.metrics()
    held_out = [record for record in records if "eval/loss" in record][-1]
    training = [record for record in records if "loss" in record][-1]
    return {
        "objective": config.objective,
        "parameters": parameters,
        "held_out": {key.removeprefix("eval/"): value for key, value in held_out.items() if key != "step"},
        "training": {key: value for key, value in training.items() if key != "step"},
        "real_tokens": fitted.totals["tokens"],
        "real_tokens_per_second": fitted.rate("tokens"),
        "corpus": dataclasses.asdict(data.train.counts),
    }


def main(config: PretrainConfig) -> int:
    """Run `bestiary pretrain` or `bestiary distill`; return the exit status."""
    config = with_defaults(config, asked_family(config))
    with start_run(config, FREE, upgrade=upgrade) as run:
        return pretrain(run, config)
