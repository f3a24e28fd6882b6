#!/usr/bin/env python3
"""Train a small model of a family on real text, and write what the reference needs to train it on the same batches.

    uv run python bench/same_batches.py --model albert-tiny --corpus BOOKS --out DIR
    python3 bench/same_batches_torch.py DIR       # with torch and transformers: the largest difference of a loss

DIR gets the initial weights as checkpoint folders, batches.npz, with each example in a row of its own, and losses.json.
There is no dropout. What a generator draws is stored with the batches, as it follows from our weights.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from bestiary import models
from bestiary.data.rows.sentence_pairs import LABELS
from bestiary.models.heads.with_head import encoder_inputs
from bestiary.train.config import OptimConfig
from bestiary.train.pretrain.config import PretrainConfig
from bestiary.train.pretrain.data import PhasedBatches, prepare_data, prepare_tokenizer
from bestiary.train.pretrain.loop import corrupt, train_step
from bestiary.train.pretrain.model import asked_family, make_model, model_config
from bestiary.train.pretrain.objectives import make_objective, with_defaults
from bestiary.train.pretrain.rtd import draw_tokens, replace_tokens
from bestiary.train.progress import Progress
from bestiary.train.sharding import Replicas


@dataclass
class Settings:
    """Train a small model, and write its batches and losses."""

    model: str
    corpus: tuple[str, ...]
    out: Path
    steps: int = 100
    rows: int = 8
    length: int = 128
    vocab_size: int = 2048
    learning_rate: float = 1e-3


def apart(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Put each example of a corrupted batch in a row of its own, and labels at their tokens, -100 elsewhere."""
    segments, length = batch["segment_ids"], batch["segment_ids"].shape[1]
    if "label_weights" in batch:  # running text, whose documents see each other
        labels = np.where(batch["label_weights"] > 0, batch["labels"], -100)
        return {"input_ids": batch["input_ids"], "attention_mask": (segments > 0).astype(np.int32), "labels": labels}
    found: dict[str, list[np.ndarray]] = {}
    order = LABELS["order"]
    for row in range(len(segments)):
        for number in range(1, segments[row].max() + 1):
            (places,) = np.nonzero(segments[row] == number)
            first, count = places[0], len(places)
            one = {name: batch[name][row, places] for name in ("input_ids", "token_type_ids") if name in batch}
            one["attention_mask"] = np.ones(count, np.int32)
            if "corrupted" in batch:
                one |= {name: batch[name][row, places] for name in ("corrupted", "replaced")}
            here = (batch["mlm_weights"][row] > 0) & np.isin(batch["mlm_positions"][row], places)
            at = batch["mlm_positions"][row][here] - first
            labels = np.full(count, -100, np.int32)
            labels[at] = batch["mlm_labels"][row][here]
            one["labels"] = labels
            if "sbo_weights" in batch:
                for name in ("left", "right", "offsets"):
                    values = np.full(count, -1, np.int32)
                    told = batch[f"sbo_{name}"][row][here] - (0 if name == "offsets" else first)
                    values[at] = np.where(batch["sbo_weights"][row][here] > 0, told, -1)
                    one[f"sbo_{name}"] = values
            for name, values in one.items():
                fill = -100 if name == "labels" else -1 if name.startswith("sbo") else 0
                padded = np.full(length, fill, np.int32)
                padded[:count] = values
                found.setdefault(name, []).append(padded)
            if f"{order}_labels" in batch:
                used = (batch["cls_positions"][row] == first) & (batch[f"{order}_weights"][row] > 0)
                label = batch[f"{order}_labels"][row][used][0] if used.any() else -100
                found.setdefault("sentence_order_label", []).append(label)
    return {name: np.stack(values) for name, values in found.items()}


def main(settings: Settings) -> int:
    """Train, and write."""
    config = PretrainConfig(
        corpus=settings.corpus,
        model=settings.model,
        vocab_size=settings.vocab_size,
        sequence_length=settings.length,
        batch_tokens=settings.rows * settings.length,
        steps=settings.steps,
        dropout=0.0,
        dtype="float32",
        optim=OptimConfig(learning_rate=settings.learning_rate, warmup=0.1),
    )
    config = with_defaults(config, asked_family(config))
    progress = Progress()
    tokenizer = prepare_tokenizer(config, progress)
    objective = make_objective(config, tokenizer)
    architecture = objective.fitted(model_config(config, tokenizer, objective.head))
    architecture = dataclasses.replace(architecture, classifier_dropout=0.0)  # which ALBERT has in pretraining too
    data = prepare_data(config, tokenizer, progress, objective.text)
    model, learner = make_model(config, architecture, objective.head)
    state = jax.jit(learner.make)()
    for name, (part, params) in objective.exports(model, jax.device_get(state.params)).items():
        models.save(settings.out / name, part, params, tokenizer)
    step = jax.jit(
        partial(train_step, replicas=Replicas(), objective=objective, model=model, learner=learner, accumulate=1)
    )

    @jax.jit
    def corrupted(state: Any, batch: Any) -> Any:
        batch = corrupt(objective, jax.random.split(jax.random.wrap_key_data(state.key))[0], batch, Replicas())
        if config.objective == "rtd":
            words = model.apply(
                {"params": state.params}, *encoder_inputs(model.config, batch), mlm_positions=batch["mlm_positions"],
                rows=batch["rows"], method="generate",
            )  # fmt: skip
            tokens, replaced = replace_tokens(batch, draw_tokens(batch["drawing_keys"], words))
            batch = {**batch, "corrupted": tokens, "replaced": replaced.astype(np.int32)}
        return batch

    stream, losses, batches = PhasedBatches(config, data, objective, lambda rows: (0, 1)), [], {}
    for number in range(settings.steps):
        batch = next(stream)
        for name, values in apart(jax.device_get(corrupted(state, batch))).items():
            batches[f"{number}.{name}"] = values
        state, sums = step(state, batch)
        losses.append({name: float(total / weight) for name, (total, weight) in jax.device_get(sums).items()})
        progress.update(f"step {number + 1}/{settings.steps}  loss {losses[-1]['loss']:.4f}")
    np.savez_compressed(settings.out / "batches.npz", **batches)
    written = {
        "model": settings.model,
        "objective": config.objective,
        "rates": [float(learner.rate(number)) for number in range(settings.steps)],
        "optim": {
            name: getattr(config.optim, name) for name in ("beta1", "beta2", "epsilon", "weight_decay", "clip_norm")
        },
        "losses": losses,
    }
    (settings.out / "losses.json").write_text(json.dumps(written))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings)))
