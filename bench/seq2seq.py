"""Measure one training step, or beam search, of T5 and BART, on full rows of random ids, as a peer's script does.

    uv run python bench/seq2seq.py train --family t5 --threads 1
    uv run python bench/seq2seq.py generate --family t5 --beams 4 --threads 1

The sizes are those of `../shared/peers/step_torch.py`, beside which to run it: 4 + 4 layers, 256 wide, 4 heads of 64, a
vocabulary of 8,192, float32, AdamW with clipping, dropout 0.1. It prints a JSON line: the median tokens/s over the
steps, source and target together, without the first three; for `generate`, new tokens/s. Seconds are CPU time, so
that other work on the machine counts little: on one thread, and for the peer with `time.process_time` as its clock.
"""

import argparse
import json
import os
import statistics
import time
from typing import Any

SIZES = {"encoder_layers": 4, "decoder_layers": 4, "width": 256, "vocab_size": 8192}


def build(family: str, positions: int) -> Any:
    """Return a model."""
    from bestiary.models.registry import family_named

    of = family_named(family)
    if family == "t5":
        config = of.config(**SIZES, heads=4, head_size=64, feed_forward=1024, eos_token_id=2)
    else:
        sides = {
            f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("heads", 4), ("feed_forward", 1024))
        }
        config = of.config(
            **SIZES, **sides, positions=positions, pad_token_id=0, bos_token_id=1, forced_eos_token_id=None
        )
    return of.build("generation", config)


def train(model: Any, rows: int, length: int, target: int, steps: int) -> dict[str, Any]:
    """Time training steps."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen as nn

    from bestiary.models.registry import init_params
    from bestiary.train.config import OptimConfig
    from bestiary.train.optim.optimizer import optimizer
    from bestiary.train.sharding import logical_specs

    boxed = init_params(model, jax.random.key(0))
    constants = {name: nn.unbox(boxed.pop(name)) for name in ("final_logits_bias",) if name in boxed}
    transform = optimizer(OptimConfig(), lambda _: jnp.float32(1e-4), logical_specs(boxed))
    params = nn.unbox(boxed)

    def step(state: Any, key: Any, source: Any, labels: Any) -> Any:
        params, optimiser = state
        shifted = jnp.concatenate([jnp.zeros((rows, 1), jnp.int32), labels[:, :-1]], axis=1)

        def loss(params: Any) -> Any:
            more = {"deterministic": False, "rngs": {"dropout": key}, "method": "output_states"}
            params = {**params, **constants}
            states = model.apply({"params": params}, source, None, None, shifted, None, None, **more)
            sums = model.apply({"params": params}, [states], labels, method="loss")
            return sums.loss / sums.weight

        value, gradient = jax.value_and_grad(loss)(params)
        updates, optimiser = transform.update(gradient, optimiser, params)
        return (optax.apply_updates(params, updates), optimiser), value

    run = jax.jit(step, donate_argnums=0)
    state, seconds = (params, transform.init(params)), []
    for number in range(steps):
        keys = jax.random.split(jax.random.key(number), 3)
        source, labels = (
            jax.random.randint(k, (rows, n), 5, 8192) for k, n in zip(keys, (length, target), strict=False)
        )
        jax.block_until_ready((source, labels))
        clock = time.process_time()
        state, value = run(state, keys[2], source, labels)
        jax.block_until_ready((state, value))
        seconds.append(time.process_time() - clock)
    median = statistics.median(seconds[3:])
    return {"tokens_per_s": round(rows * (length + target) / median, 1), "step_s": round(median, 4)}


def generate(model: Any, rows: int, prompt: int, new: int, beams: int) -> dict[str, Any]:
    """Time beam search of outputs of one length."""
    import jax
    import numpy as np
    from flax import linen as nn

    from bestiary.models.registry import init_params
    from bestiary.train.generate.config import DecodeConfig
    from bestiary.train.generate.generator import Generator

    params = nn.unbox(jax.jit(lambda: init_params(model, jax.random.key(0)))())
    generator = Generator(model, params, DecodeConfig(beam=beams, max_length=new, min_length=new - 1), rows=rows)
    rates = []
    for number in range(5):
        sources = np.random.default_rng(number).integers(5, 8192, (rows, prompt)).tolist()
        clock = time.process_time()
        found = generator(sources)
        assert all(len(best[0].tokens) >= new - 1 for best in found)
        rates.append(rows * new / (time.process_time() - clock))
    return {"new_tokens_per_s": round(statistics.median(rates[2:]), 1), "beams": beams}


def main() -> None:
    """Run one measurement."""
    from bestiary.train.machine.cpu import prepare_cpu

    prepare_cpu()  # as every command does
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["train", "generate"])
    parser.add_argument("--family", choices=["t5", "bart"], default="t5")
    numbers = dict(rows=8, length=512, target=114, steps=10, prompt=32, new=128, beams=4, threads=2)
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: a.threads])
    model = build(a.family, max(a.length, a.prompt + a.new) + 8)
    if a.what == "train":
        found = train(model, a.rows, a.length, a.target, a.steps)
    else:
        found = generate(model, a.rows, a.prompt, a.new, a.beams)
    print(json.dumps({"family": a.family, **found}))


if __name__ == "__main__":
    main()
