"""Measure a GPT-2 on this machine: training steps on full rows of random ids, generation, and the first token.

    python bench/decoders.py train --layers 4 --width 256 --length 512 --rows 8
    python bench/decoders.py generate --layers 4 --width 256 --rows 16 --prompt 32 --new 128

Prints a JSON line, with medians; compiling does not count. Seconds are this process's CPU time with --cpu-time, which
is what to compare on a machine that others use too, with one core for each of the processes compared.
"""

import argparse
import json
import statistics
import time
from functools import partial

import jax
import numpy as np
from flax import linen as nn

from bestiary.models.decoders.gpt2 import FAMILY, GPT2Config
from bestiary.models.registry import init_params
from bestiary.train.config import OptimConfig, ParallelConfig
from bestiary.train.generate.config import DecodeConfig
from bestiary.train.generate.generator import Generator
from bestiary.train.learner import make_learner
from bestiary.train.machine.cpu import prepare_cpu
from bestiary.train.optim.schedule import schedule
from bestiary.train.pretrain.causal import NextTokens
from bestiary.train.pretrain.loop import train_step
from bestiary.train.sharding import start_parallelism


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "generate"])
    for name, default in dict(
        layers=4, width=256, vocab=8192, length=512, rows=8, steps=12, skip=3, prompt=32, new=128, beams=1
    ).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--cpu-time", action="store_true")
    a = parser.parse_args()
    prepare_cpu()
    positions = max(a.length, a.prompt + a.new) + 8
    config = GPT2Config(
        vocab_size=a.vocab, width=a.width, layers=a.layers, heads=a.width // 64, feed_forward=4 * a.width,
        positions=positions, dtype="bfloat16" if a.bf16 else "float32", bos_token_id=1, eos_token_id=2,
        **GPT2Config().dropout_fields(a.dropout),
    )  # fmt: skip
    model = FAMILY.build("causal_lm", config)
    found = train(a, model) if a.what == "train" else generate(a, model)
    print(json.dumps({"bf16": a.bf16, **found}))


def train(a: argparse.Namespace, model: object) -> dict[str, float]:
    """Return tokens per second of training steps."""
    optim = OptimConfig(learning_rate=1e-4)
    learner = make_learner(partial(init_params, model), optim=optim, rate=schedule(optim, [(a.steps, None)]), seed=0)
    parallelism = start_parallelism(ParallelConfig())
    state = parallelism.initialise(learner.make, learner.specs)
    objective = NextTokens(None, True)  # pyright: ignore[reportArgumentType] (it needs no tokenizer here)
    step = parallelism.compile_train(
        partial(train_step, objective=objective, model=model, learner=learner, accumulate=1), learner.specs
    )
    seconds, clock = [], time.process_time if a.cpu_time else time.perf_counter
    draw = np.random.default_rng(0)
    for number in range(a.steps):
        ids = draw.integers(5, a.vocab, (a.rows, a.length + 1)).astype(np.int32)
        batch = {
            "input_ids": ids[:, :-1],
            "labels": ids[:, 1:],
            "label_weights": np.ones((a.rows, a.length), np.float32),
            "segment_ids": np.ones((a.rows, a.length), np.int32),
            "position_ids": np.broadcast_to(np.arange(a.length, dtype=np.int32), (a.rows, a.length)),
            "row_ids": np.stack([np.full(a.rows, number), np.arange(a.rows)], 1).astype(np.uint32),
        }
        start = clock()
        state, sums = step(state, parallelism.shard_batch(batch))
        jax.block_until_ready(sums)
        if number >= a.skip:
            seconds.append(clock() - start)
    median = statistics.median(seconds)
    return {"tokens_per_s": round(a.rows * a.length / median, 1), "step_s": round(median, 4)}


def generate(a: argparse.Namespace, model: object) -> dict[str, float]:
    """Return new tokens per second, and the seconds to the first token of one prompt."""
    params = jax.device_get(nn.unbox(jax.jit(partial(init_params, model))(jax.random.key(0))))
    draw = np.random.default_rng(0)

    def prompts(count: int) -> list[list[int]]:
        return draw.integers(5, a.vocab, (count, a.prompt)).tolist()

    config = DecodeConfig(beam=a.beams, max_length=a.new, min_length=a.new - 1)
    many = Generator(model, params, config, rows=a.rows)
    one = Generator(model, params, DecodeConfig(max_length=1), rows=1)
    rates, first, clock = [], [], time.process_time if a.cpu_time else time.perf_counter
    for number in range(6):
        start = clock()
        many(prompts(a.rows))
        rates.append(a.rows * a.new / (clock() - start))
        start = clock()
        one(prompts(1))
        first.append(clock() - start)
        if not number:  # which compiles
            rates, first = [], []
    return {
        "new_tokens_per_s": round(statistics.median(rates), 1),
        "beams": a.beams,
        "first_token_s": round(statistics.median(first), 4),
    }


if __name__ == "__main__":
    main()
