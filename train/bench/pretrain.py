"""Measure pretraining: real tokens/s, the loss at the end, and the fraction of the matmul rate.

    bestiary bench pretrain --corpus books/ --tokenizer DIR --model bert-mini --sequence-length 512 --out FILE

The fraction counts only necessary operations: matrix products on real tokens, attention within each example, logits at
predicted positions; times three for forward and backward, or once for a teacher. Padding, dropout, norms and the
optimiser do not count. By CPU time, of all threads, the fraction is that of a CPU that nobody else uses.
"""

import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...data.json_files import json_text, write_json
from ..config import OptimConfig
from ..errors import RunError
from ..learner import count_parameters
from ..loop import Stop
from ..pretrain.config import DistillConfig, PretrainConfig
from ..pretrain.data import PhasedBatches, prepare_data, prepare_tokenizer
from ..pretrain.loop import Evaluation, train_step
from ..pretrain.model import asked_family, make_model, model_config
from ..pretrain.objective import Network
from ..pretrain.objectives import make_objective, with_defaults
from ..progress import Progress
from ..sharding import start_parallelism
from .config import PretrainBenchConfig

Clock = Callable[[], float]


def main(config: PretrainBenchConfig) -> int:
    """Run `bestiary bench pretrain`; return the exit status."""
    progress = Progress()
    settings: dict[str, Any] = dict(
        corpus=config.corpus,
        tokenizer=config.tokenizer,
        cache=config.cache,
        model=config.model,
        sequence_length=config.sequence_length,
        batch_tokens=config.sequence_length * config.rows,
        steps=config.steps,
        dtype=config.dtype,
        attention=config.attention,
        parallelism=config.parallelism,
        seed=config.seed,
        optim=OptimConfig(learning_rate=config.learning_rate, warmup=config.warmup, schedule="constant"),
        evaluation_rows=16 * config.rows,
    )
    if config.teacher is None:
        training = PretrainConfig(objective=config.objective, **settings)
    else:
        training = DistillConfig(teacher=config.teacher, **settings)
    training = with_defaults(training, asked_family(training))
    parallelism = start_parallelism(config.parallelism)
    tokenizer = prepare_tokenizer(training, progress)
    objective = make_objective(training, tokenizer)
    architecture = objective.fitted(model_config(training, tokenizer, objective.head))
    if not hasattr(architecture, "feed_forward"):
        raise RunError(f"--model {training.model}: the operations that a step needs are counted for Transformers only.")
    data = prepare_data(training, tokenizer, progress, objective.text)
    model, learner = make_model(training, architecture, objective.head, objective.memory)
    fixed = objective.fixed(parallelism)
    evaluate = Evaluation(training, data, objective, model, parallelism, *fixed)

    matmul, matmul_cpu = (matmul_rate(architecture.dtype, clock) for clock in (time.perf_counter, time.process_time))
    pipeline = pipeline_rate(PhasedBatches(training, data, objective, parallelism.share), config.steps)
    stream = PhasedBatches(training, data, objective, parallelism.share)
    state = parallelism.initialise(learner.make, learner.specs)
    update = partial(train_step, objective=objective, model=model, learner=learner, accumulate=1)
    step = parallelism.compile_train(update, learner.specs, *fixed)
    networks = objective.networks(architecture)
    seconds, cpu_seconds, tokens, needed, losses = [], [], [], [], []
    for number in range(config.steps):
        batch = next(stream)
        clock, cpu_clock = time.perf_counter(), time.process_time()
        state, sums = step(state, parallelism.shard_batch(batch))
        sums = jax.device_get(sums)
        seconds.append(time.perf_counter() - clock)
        cpu_seconds.append(time.process_time() - cpu_clock)
        tokens.append(int((batch["segment_ids"] > 0).sum()))
        needed.append(needed_operations(networks, batch, masked=float(sums.get("mlm_loss", (0, 0))[1])))
        losses.append(float(sums["loss"][0]))
        progress.update(
            f"step {number + 1}/{config.steps}  loss {losses[-1]:.3f}  {tokens[-1] / seconds[-1]:,.0f} tokens/s"
        )
    held_out = evaluate(state, Stop())
    timed = slice(min(config.skip, config.steps - 1), None)
    rate = sum(needed[timed]) / sum(seconds[timed])
    result = {
        "bench": "pretrain",
        "settings": {
            name: value for name, value in dataclasses.asdict(config).items() if isinstance(value, int | float | str)
        },
        "dtype": architecture.dtype,
        "parameters": count_parameters(state.params),
        "real_tokens_per_second": sum(tokens[timed]) / sum(seconds[timed]),
        "real_tokens_per_second_of_median_step": statistics.median(tokens[timed]) / statistics.median(seconds[timed]),
        "step_seconds": {
            "median": statistics.median(seconds[timed]),
            "min": min(seconds[timed]),
            "max": max(seconds[timed]),
        },
        "compile_and_first_step_seconds": seconds[0],
        "needed_gflops": rate / 1e9,
        "matmul_gflops": matmul / 1e9,
        "share_of_matmul_rate": rate / (matmul * jax.device_count()),
        "cpu_time": {
            "median_step_seconds": statistics.median(cpu_seconds[timed]),
            "share_of_matmul_rate": sum(needed[timed]) / sum(cpu_seconds[timed]) / matmul_cpu,
        },
        "pipeline_tokens_per_second": pipeline,
        "tokens": sum(tokens),
        "loss_of_last_steps": statistics.mean(losses[-5:]),
        "held_out": held_out,
        "machine": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {platform.machine()}",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("bestiary", "jax", "jaxlib", "flax", "optax")},
    }
    if config.out is not None:
        write_json(config.out, result)
    print(json_text(result, "the measurements", indent=2))
    return 0


def matmul_rate(dtype: str, clock: Clock = time.perf_counter, size: int = 2048, repeats: int = 9) -> float:
    """Return the median rate of one device on square matrix products in `dtype`, in operations per second."""
    product = jax.jit(lambda left, right: left @ right)
    left, right = (jax.random.normal(jax.random.key(seed), (size, size), jnp.dtype(dtype)) for seed in (0, 1))
    jax.block_until_ready(product(left, right))
    seconds = []
    for _ in range(repeats):
        start = clock()
        jax.block_until_ready(product(left, right))
        seconds.append(clock() - start)
    return 2 * size**3 / statistics.median(seconds)


def pipeline_rate(stream: PhasedBatches, count: int) -> float:
    """Return the real tokens per second from the cache to NumPy batches, planning included, on an idle machine."""
    next(stream)  # opens the cache and plans the first window
    clock, tokens = time.perf_counter(), 0
    for _ in range(count - 1):
        tokens += int((next(stream)["segment_ids"] > 0).sum())
    return tokens / (time.perf_counter() - clock)


def needed_operations(networks: Sequence[Network], batch: dict[str, np.ndarray], masked: float) -> float:
    """Return the floating-point operations of a training step that any implementation needs.

    Args:
        networks: what the step runs: encoders with `layers`, `width`, `feed_forward` and `vocab_size`.
        batch: of the step.
        masked: number of masked tokens.
    """
    segments = batch["segment_ids"]
    tokens = float((segments > 0).sum())
    area = sum(float((np.bincount(row)[1:] ** 2).sum()) for row in segments)
    found = 0.0
    for c, predicts, trained in networks:
        layer = 2 * tokens * (4 * c.width**2 + 2 * c.width * c.feed_forward) + 4 * c.width * area
        table = getattr(c, "table_width", c.width)  # a decoder's word vectors are as wide as its hidden states
        word = table * (c.width + c.vocab_size)
        outputs = {"masked": masked * word, "all": tokens * word, "flags": tokens * c.width * (c.width + 1)}
        found += (3 if trained else 1) * (c.layers * layer + 2 * outputs.get(predicts, 0.0))
    return found
