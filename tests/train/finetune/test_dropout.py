"""Fine-tuning draws dropout by example: packed, padded, divided and spread, a step has the same loss and gradient."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from bestiary.data import load_tokenizer
from bestiary.data.batches import Features, assemble
from bestiary.data.tasks.glue import TextExample
from bestiary.data.tasks.multiple_choice import Choice
from bestiary.data.tasks.squad import Answer, Question
from bestiary.data.tasks.tagging import Sentence
from bestiary.models.encoders.bert import BertConfig
from bestiary.models.encoders.distilbert import DistilBertConfig
from bestiary.models.encoders.roberta import RobertaConfig
from bestiary.models.registry import family_named, init_params
from bestiary.train.adapt.adapters import AdaptedModel, adaptation
from bestiary.train.adapt.layer_rates import Depths
from bestiary.train.config import AdaptConfig, ParallelConfig
from bestiary.train.finetune.loop import train_step
from bestiary.train.finetune.tasks.choice import ChoiceTask
from bestiary.train.finetune.tasks.glue import glue_task
from bestiary.train.finetune.tasks.squad import SquadTask
from bestiary.train.finetune.tasks.tagging import TaggingTask
from bestiary.train.learner import Learner, TrainState
from bestiary.train.sharding import Replicas, start_parallelism

WORDS = ("the", "film", "was", "a", "story", "of", "two", "men", "and", "one", "house", "in", "town", "who", "bob")
SIZES: Any = dict(vocab_size=24, width=16, heads=2, feed_forward=24, positions=512, dropout=0.3, attention_dropout=0.3)


def texts(count: int) -> list[str]:
    draw = np.random.default_rng(0)
    return [" ".join(draw.choice(WORDS, size)) for size in draw.integers(1, 7, count)]


def text_features(task: Any, tokenizer: Any) -> Features:
    some = [TextExample(text, None, n % 2, str(n), "f") for n, text in enumerate(texts(8))]
    return task.encode(tokenizer, some)


def rating_features(task: Any, tokenizer: Any) -> Features:
    some = [TextExample(text, text[::-1], n / 2, str(n), "f") for n, text in enumerate(texts(8))]
    return task.encode(tokenizer, some)


def choice_features(task: Any, tokenizer: Any) -> Features:
    some = texts(8)
    asked = [Choice(str(n), tuple((text, ending) for ending in some[:4]), n % 4, "f") for n, text in enumerate(some)]
    return task.encode(tokenizer, asked)


def span_features(task: Any, tokenizer: Any) -> Features:
    context = " ".join(WORDS[:12])
    some = [Question(str(n), "who was", context[n:], (Answer(context[n + 4 : n + 9], 4),)) for n in (0, 9, 18)] * 2
    return task.encode(tokenizer, some + some[:2])


def tag_features(task: Any, tokenizer: Any) -> Features:
    sentences = [tuple(text.split()) for text in texts(8)]
    tags = [("B-x", "I-x", "O", "O", "B-x", "O", "O")[: len(words)] for words in sentences]
    some = [Sentence(w, t, "f", tuple(range(len(w)))) for w, t in zip(sentences, tags, strict=True)]
    return task.encode(tokenizer, some)


def tagging(*, crf: bool) -> TaggingTask:
    return TaggingTask("ner", 16, ("O", "B-x", "I-x"), crf, 1.0, True, "iob2", False, 0, -1, "upos")


TASKS: dict[str, tuple[Any, Callable[..., Features], Any]] = {
    "classification": (glue_task("sst2", 16), text_features, RobertaConfig),
    "regression": (glue_task("stsb", 32), rating_features, BertConfig),
    "choice": (ChoiceTask("swag", 16), choice_features, DistilBertConfig),
    "span": (SquadTask("squad", 24, 8, 4, 4, 5, None, False), span_features, BertConfig),
    "tags": (tagging(crf=False), tag_features, BertConfig),
    "tags with a CRF": (tagging(crf=True), tag_features, BertConfig),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Any:
    vocabulary = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    vocabulary.write_text("\n".join(pieces + [f"##{n}" for n in range(24 - len(pieces))]) + "\n")
    return load_tokenizer(vocabulary)


def batch_of(features: Features, rows: list[list[int]], length: int) -> dict[str, np.ndarray]:
    """The units in the rows as given."""
    units = np.array([unit for row in rows for unit in row])
    row_of = np.array([number for number, row in enumerate(rows) for _ in row])
    slots = max(map(len, rows)) * features.unit_size
    return assemble(features, units, row_of, range(len(rows)), length=length, slots=slots, pad_id=0).batch


Run = Callable[[dict[str, np.ndarray]], dict[str, float]]


def stepper(task: Any, model: Any, features: Features, accumulate: int, how: ParallelConfig | None = None) -> Run:
    """From a batch to the loss and the gradient's norm of a first step, on one device or as a run spreads it."""
    shapes = nn.unbox(jax.eval_shape(partial(init_params, model), jax.random.key(0)))
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: np.float32(draw.normal(size=leaf.shape) * 0.4), shapes)
    trains = jax.tree.map(lambda _: True, params)
    learner = Learner(optax.identity(), lambda _: jnp.float32(0), None, lambda: state, trains)  # type: ignore[arg-type]
    state = TrainState(np.int32(0), params, optax.EmptyState(), np.array([1, 2], np.uint32))  # type: ignore[arg-type]
    settings: Any = dict(task=task, model=model, learner=learner, depths=Depths({}, 2), frozen=0)
    step = partial(train_step, **settings, accumulate=accumulate, unit_size=features.unit_size)
    place, train = dict, jax.jit(partial(step, replicas=Replicas()))
    if how is not None:
        devices = start_parallelism(how)
        place, train = devices.shard_batch, devices.compile_train(step, jax.tree.map(lambda _: P(), state))

    def run(batch: dict[str, np.ndarray]) -> dict[str, float]:
        sums = train(jax.tree.map(jnp.asarray, state), place(batch))[1]
        found = jax.device_get({name: sums[name] for name in ("loss", "gradient_norm", task.unit)})
        return {name: float(total / weight) for name, (total, weight) in found.items()}

    return run


def agree(task: Any, model: Any, features: Features, *hows: ParallelConfig) -> None:
    """Compare a step of all units in one row with one of a row for each: in two parts, or spread over devices."""
    assert features.units == 8
    longest = int(features.unit_lengths.max())
    order = np.random.default_rng(1).permutation(8).tolist()
    together = batch_of(features, [order], 8 * longest)
    run = stepper(task, model, features, 1)
    expected = run(together)
    assert expected[task.unit] == 8
    other = run({**together, "feature_ids": together["feature_ids"] + 32})
    assert abs(other["loss"] / expected["loss"] - 1) > 1e-3, "other examples have other masks"
    apart = batch_of(features, [[unit] for unit in range(8)] + [[]] * 8, longest + 3)
    for how in (None, *hows):
        found = stepper(task, model, features, 2, how)(apart)
        assert found == pytest.approx(expected, rel=1e-5)


def build(name: str, layers: int) -> tuple[Any, Any, Callable[..., Features]]:
    task, make, config = TASKS[name]
    size = config(layers=layers, **SIZES, **task.model_changes())
    return task, family_named(config.MODEL_TYPE).build(task.head, size), make


@pytest.mark.parametrize("name", TASKS)
def test_packed_padded_and_in_parts_are_one(name, tokenizer):
    task, model, make = build(name, 2 if name == "classification" else 1)
    agree(task, model, make(task, tokenizer))


@pytest.mark.parametrize("parallel", ["mesh", "pmap"])
def test_spread_over_devices_too(parallel, tokenizer):
    task, model, make = build("tags", 1)
    agree(task, model, make(task, tokenizer), ParallelConfig(parallel=parallel))


def test_adapters_inputs_too(tokenizer):
    """Also those of the last layer, of which a classifier computes only [CLS]."""
    task, model, make = build("regression", 1)
    plan = adaptation(AdaptConfig(lora_rank=2, lora_dropout=0.4, lora_targets=("all-linear",)), model, {})
    agree(task, AdaptedModel(model, plan), make(task, tokenizer))
