"""Measure translation: real target tokens/s of training, sentences/s of decoding.

    bestiary bench translate --source train.en.gz --target train.de.gz --tokenizer spm.model --test test.en.gz
    bestiary bench translate --model FOLDER --test test.en.gz --beam 5 --batch 64

With --source and --target it trains a new model for a number of steps; with --test it translates a file, with --model
or with the model just trained. The first pass over the test file compiles, the second is timed.
"""

import dataclasses
import platform
import statistics
import time
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Any

import jax

from ...data.json_files import json_text, write_json
from ...data.reading import read_lines
from ...data.stream import training_batches
from ..learner import count_parameters, on_host
from ..progress import Progress
from ..sharding import start_parallelism
from ..translate.config import TranslateConfig
from ..translate.data import make_rows, prepare_data
from ..translate.train import make_model, model_config, train_step
from ..translate.translator import Translator, open_translator
from .config import TranslateBenchConfig


def main(config: TranslateBenchConfig) -> int:
    """Run `bestiary bench translate`; return the exit status."""
    progress = Progress()
    result: dict[str, Any] = {"bench": "translate"}
    translator = None
    if config.source is not None:
        result["training"], translator = measure_training(config, progress)
    if config.model is not None:
        compute = None if config.dtype == "auto" else config.dtype
        translator = open_translator(config.model, config.decode, rows=config.batch, dtype=compute)
    if config.test is not None and translator is not None:
        result["decoding"] = measure_decoding(config, translator, progress)
    result |= {
        "settings": {
            name: value for name, value in dataclasses.asdict(config).items() if isinstance(value, int | float | str)
        },
        "machine": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {platform.machine()}",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("bestiary", "jax", "jaxlib", "flax", "optax")},
    }
    if config.out is not None:
        write_json(config.out, result)
    print(json_text(result, "the measurements", indent=2))
    return 0


def measure_training(config: TranslateBenchConfig, progress: Progress) -> tuple[dict[str, Any], Translator]:
    """Train a new model; return the figures, and a translator with the model."""
    names = {field.name for field in dataclasses.fields(TranslateConfig)} & {
        field.name for field in dataclasses.fields(config)
    }
    shared = {name: getattr(config, name) for name in names - {"out", "steps"}}
    training = TranslateConfig(**shared, steps=max(config.steps, 400))
    parallelism = start_parallelism(config.parallelism)
    data = prepare_data(training, progress)
    architecture = model_config(training, data.tokenizer)
    model, learner = make_model(training, architecture)
    rows = make_rows(training, data, architecture.decoder_start_token_id, progress)
    index, count = parallelism.share(training.rows)
    stream = training_batches(rows, batch_rows=training.rows, host_index=index, host_count=count)
    update = partial(train_step, model=model, learner=learner, smoothing=0.1, r_drop=0.0, accumulate=1)
    step = parallelism.compile_train(update, learner.specs)
    state = parallelism.initialise(learner.make, learner.specs)
    seconds, tokens, losses = [], [], []
    for number in range(config.steps):
        batch = next(stream)
        clock = time.perf_counter()
        state, sums = step(state, parallelism.shard_batch(batch))
        sums = jax.device_get(sums)
        seconds.append(time.perf_counter() - clock)
        tokens.append(float(sums["target_tokens"][0]))
        losses.append(float(sums["loss"][0] / sums["loss"][1]))
        rate = tokens[-1] / seconds[-1]
        progress.update(f"step {number + 1}/{config.steps}  loss {losses[-1]:.3f}  {rate:,.0f} target tokens/s")
    timed = slice(config.skip, None)
    params = on_host(state.params)
    figures = {
        "target_tokens_per_second": sum(tokens[timed]) / sum(seconds[timed]),
        "target_tokens_per_second_of_median_step": statistics.median(tokens[timed]) / statistics.median(seconds[timed]),
        "step_seconds": {
            "median": statistics.median(seconds[timed]),
            "min": min(seconds[timed]),
            "max": max(seconds[timed]),
        },
        "compile_and_first_step_seconds": seconds[0],
        "target_tokens_a_step": statistics.mean(tokens),
        "packing": str(rows.statistics()),
        "loss_of_last_steps": statistics.mean(losses[-5:]),
        "parameters": count_parameters(params),
        "vocabulary": data.tokenizer.target.size,
        "dtype": architecture.dtype,
    }
    return figures, Translator(model, jax.device_put(params), data.tokenizer, config.decode, rows=config.batch)


def measure_decoding(config: TranslateBenchConfig, translator: Translator, progress: Progress) -> dict[str, Any]:
    """Translate the test file; return the figures."""
    assert config.test is not None
    lines = list(read_lines(config.test, "utf-8"))[: config.limit]
    progress.line(f"translating {len(lines):,} lines, beam {config.decode.beam}, batch {config.batch}")
    clock = time.perf_counter()
    translator.translate(lines)
    first = time.perf_counter() - clock
    compiled = translator.generator.compilations
    clock = time.perf_counter()
    found = translator.translate(lines)
    seconds = time.perf_counter() - clock
    return {
        "sentences_per_second": len(lines) / seconds,
        "sentences_per_second_with_compilation": len(lines) / first,
        "programs_compiled": compiled,
        "programs_compiled_in_second_pass": translator.generator.compilations - compiled,
        "sentences": len(lines),
        "mean_characters": statistics.mean(len(translations[0].text) for translations in found),
        "beam": config.decode.beam,
        "batch": config.batch,
    }
