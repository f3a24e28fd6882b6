"""Probe a pretrained encoder: train a cheap head on its features, which are computed once.

    bestiary probe --task mrpc --data glue/MRPC --model FOLDER --out runs/probe-mrpc
    bestiary probe --task cola --data glue/CoLA --model FOLDER --layers all --mix --out runs/probe-cola
    bestiary probe --data reviews.csv --text review --label stars --model FOLDER --out runs/probe-stars

The features are cached under a fingerprint of everything that determines them (weights, tokenizer, settings, texts), so
that a second probe reads a file. The head is scikit-learn's logistic regression, or ridge regression for numbers, on
standardised features.
"""

import dataclasses
import hashlib
import json
import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import softmax

from ...data.batches import pack_features
from ...data.cloud.mirror import fetch, publish
from ...data.errors import DataError
from ...data.files import replacing, user_cache_folder
from ...data.json_files import write_json
from ...data.random import RandomStream
from ...data.tasks.tables import TextExample
from ...models.heads.pooling import mix
from ..finetune.tasks.glue import glue_data, glue_task
from ..finetune.tasks.table import table_task
from ..finetune.tasks.task import Collected, TaskData, hold_out
from ..finetune.tasks.text import TextTask
from ..progress import Progress, Work, duration
from ..run_folder import RunFolder
from .config import FeatureConfig, ProbeConfig
from .elmo import ElmoExtractor, open_extractor
from .extract import Extractor, Settings, windows

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Inverse regularisation strengths to try for a classifier (scikit-learn's C)."""
PENALTIES = tuple(10.0**power for power in range(-2, 7))
"""Penalties to try for ridge regression (scikit-learn's alpha)."""
TRIED_EXAMPLES = 4000
"""Maximum number of training examples for choosing a classifier's regularisation strength."""


# --- data -------------------------------------------------------------------------------------------------------------


def read_data(config: ProbeConfig) -> tuple[TextTask, TaskData]:
    """Read the task and its examples.

    Raises:
        DataError: the data is invalid; with file and line.
    """
    length = 1  # a task's own encoding is not used
    if config.task is not None:
        task = glue_task(config.task, length)
        data = glue_data(task, config.data)
    else:
        path = Path(config.data)
        task = table_task(
            path,
            text=config.text,
            text_pair=config.text_pair,
            label=config.label,
            labels=config.labels,
            regression=config.regression,
            max_length=length,
        )
        train = task.read(path, "train", labelled=True)
        if config.dev is not None:
            dev = task.read(config.dev, "dev", labelled=True)
        else:
            train, dev = hold_out(train, config.dev_fraction, config.seed)
        data = TaskData(train, {"dev": dev})
    if config.train_examples and config.train_examples < len(data.train):
        data = data._replace(train=hold_out(data.train, config.train_examples / len(data.train), config.seed)[1])
    return task, data


# --- features ---------------------------------------------------------------------------------------------------------


class FeatureStore:
    """Features of texts, computed once and stored as files."""

    def __init__(self, extract: Extractor | ElmoExtractor, folder: Path, progress: Progress):
        self._extract, self._folder, self._progress = extract, folder, progress
        self.truncated = 0  # truncated tokens of all texts so far

    def __call__(self, name: str, texts: Sequence[str], seconds: Sequence[str] | None = None) -> np.ndarray:
        """Return features [n, ...] float32 of n texts, or of pairs encoded together; `name` is for messages."""
        key = json.dumps([self._extract.fingerprint, list(texts), None if seconds is None else list(seconds)])
        path = self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
        if not path.is_file():
            fetch(path, missing=True)
        found = self._stored(path, name, len(texts)) if path.is_file() else None
        if found is None:
            before = self._extract.truncated
            vectors = self._computed(name, texts, seconds)
            self._folder.mkdir(parents=True, exist_ok=True)
            found = vectors, self._extract.truncated - before
            with replacing(path) as unfinished:
                np.savez(unfinished, vectors=vectors, truncated=found[1])
            publish(path)
        self.truncated += found[1]
        return found[0]

    def _stored(self, path: Path, name: str, texts: int) -> tuple[np.ndarray, int] | None:
        """Return (features, truncated tokens) of an earlier run; None if the file is damaged."""
        try:
            with path.open("rb") as file, np.load(file) as stored:  # a zip archive, which checks a CRC-32 of each array
                vectors, truncated = stored["vectors"], int(stored["truncated"])
            if len(vectors) != texts or vectors.dtype != np.float32:
                raise ValueError(f"{vectors.dtype} of {len(vectors)} texts")
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            self._progress.line(f"features of {name}: {path} is damaged ({error}); they are computed again")
            return None
        self._progress.line(f"features of {name}: read from {path}")
        return vectors, truncated

    def _computed(self, name: str, texts: Sequence[str], seconds: Sequence[str] | None) -> np.ndarray:
        work, parts, done = Work(self._progress, f"features of {name}", len(texts), "texts"), [], 0
        for window in windows(texts):
            more = None if seconds is None else seconds[done : done + len(window)]
            parts.append(self._extract(window, more).vectors)
            done += len(window)
            work.update(done)
        return np.concatenate(parts)


def features_of(store: FeatureStore, name: str, examples: Sequence[TextExample], together: bool) -> list[np.ndarray]:
    """Return features [n, ...] of the examples' texts: one array, or two for pairs that are encoded separately."""
    first = [example.first for example in examples]
    if examples[0].second is None:
        return [store(name, first)]
    second = [example.second or "" for example in examples]
    if together:
        return [store(name, first, second)]
    return [store(f"{name}'s first texts", first), store(f"{name}'s second texts", second)]


def joined(vectors: Sequence[Any]) -> Any:
    """Return the vectors u of texts, or |u - v| and u · v of pairs, concatenated: [n, E] each -> [n, E] or [n, 2 E]."""
    if len(vectors) == 1:
        return vectors[0]
    u, v = vectors
    return jnp.concatenate([jnp.abs(u - v), u * v], axis=-1)


# --- the learned mix of layers ----------------------------------------------------------------------------------------


class Mix(NamedTuple):
    """Weights of a sum of layers."""

    weights: np.ndarray  # [K], before the softmax
    gamma: float

    def __call__(self, vectors: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Mix the layers: [n, K, E] each -> [n, E] each."""
        weights, gamma = jnp.asarray(self.weights, jnp.float32), jnp.float32(self.gamma)
        return [np.asarray(mix(jnp.asarray(array), weights, gamma)) for array in vectors]

    @property
    def shares(self) -> list[float]:
        """Return the normalised weight of each layer; they add up to 1."""
        return softmax(self.weights).tolist()


def learn_mix(vectors: Sequence[np.ndarray], targets: np.ndarray, classes: int | None, steps: int = 200) -> Mix:
    """Fit a linear head together with the mix of layers, by L-BFGS on all examples (with a weak penalty on the head).

    Args:
        vectors: [n, K, E] of the texts, or two such arrays for pairs.
        targets: [n] classes or numbers.
        classes: number of classes; None for regression.
        steps: maximum number of optimiser steps.
    """
    from scipy.optimize import minimize

    layers = vectors[0].shape[1]
    even = joined([array.mean(axis=1) for array in vectors])
    centre, spread = even.mean(axis=0), even.std(axis=0) + 1e-6
    width, outputs = even.shape[-1], classes or 1
    numbers = targets if classes is not None else (targets - targets.mean()) / (targets.std() + 1e-6)
    goal = jnp.asarray(numbers, jnp.int32 if classes is not None else jnp.float32)
    placed = [jnp.asarray(array) for array in vectors]

    def loss(flat: jax.Array, placed: list[jax.Array]) -> jax.Array:
        weights, gamma, bias = flat[:layers], flat[layers], flat[layers + 1 : layers + 1 + outputs]
        kernel = flat[layers + 1 + outputs :].reshape(width, outputs)
        inputs = joined([mix(array, weights, gamma) for array in placed])
        logits = ((inputs - centre[None]) / spread[None]) @ kernel + bias[None]
        if classes is None:
            errors = jnp.square(logits[:, 0] - goal)
        else:
            errors = -jnp.take_along_axis(jax.nn.log_softmax(logits), goal[:, None], axis=1)[:, 0]
        return errors.mean() + 0.5 * jnp.square(kernel).sum() / len(goal)

    compiled = jax.jit(jax.value_and_grad(loss))

    def evaluate(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = compiled(jnp.asarray(flat, jnp.float32), placed)
        return float(value), np.asarray(gradient, np.float64)

    start = np.concatenate([np.zeros(layers), [1.0], np.zeros(outputs + width * outputs)])
    found = minimize(evaluate, start, jac=True, method="L-BFGS-B", options={"maxiter": steps}).x
    return Mix(found[:layers], float(found[layers]))


# --- the head ---------------------------------------------------------------------------------------------------------


class Head(NamedTuple):
    """A linear head on standardised features."""

    centre: np.ndarray  # [E]
    spread: np.ndarray  # [E]
    kernel: np.ndarray  # [E, C], C = 1 for regression
    bias: np.ndarray  # [C]
    strength: float  # inverse strength of its regularisation

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """Compute logits or values [n, C] from features [n, E]."""
        return ((inputs - self.centre) / self.spread) @ self.kernel + self.bias


def fit_head(inputs: np.ndarray, targets: np.ndarray, classes: int | None, strength: float | None, seed: int) -> Head:
    """Fit ridge regression, or logistic regression over `classes` classes.

    Args:
        inputs: [n, E].
        targets: [n].
        classes: number of classes; classes without examples get a logit of -inf. None for regression.
        strength: inverse regularisation strength (C, or 1 / alpha); None for cross-validation: leave-one-out for ridge
            regression, three folds of at most `TRIED_EXAMPLES` examples for logistic regression.
        seed: seed of the sample for cross-validation.
    """
    from sklearn.preprocessing import StandardScaler

    inputs = inputs.astype(np.float64)
    scaler: Any = StandardScaler().fit(inputs)
    scaled = scaler.transform(inputs)
    if classes is None:
        from sklearn.linear_model import RidgeCV

        ridge: Any = RidgeCV(alphas=PENALTIES if strength is None else [1 / strength]).fit(scaled, targets)
        kernel, bias = ridge.coef_[:, None], np.array([ridge.intercept_])
        return Head(scaler.mean_, scaler.scale_, kernel, bias, 1 / float(ridge.alpha_))

    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    def classifier(c: float) -> Any:
        return LogisticRegression(C=c, max_iter=2000)

    if strength is None:
        some = RandomStream(seed, len(targets)).permutation(len(targets))[:TRIED_EXAMPLES]
        folds = min(3, int(np.bincount(targets[some])[np.unique(targets[some])].min()))
        strength = 1.0
        if folds > 1:
            search = GridSearchCV(classifier(1.0), {"C": STRENGTHS}, cv=StratifiedKFold(folds), scoring="neg_log_loss")
            strength = float(search.fit(scaled[some], targets[some]).best_params_["C"])
    logistic = classifier(strength).fit(scaled, targets)
    kernel = np.zeros((inputs.shape[1], classes))
    bias = np.full(classes, -np.inf)
    seen = logistic.classes_
    if len(seen) == 2:  # for two classes scikit-learn has one decision function: the second class against the first
        kernel[:, seen[1]], bias[seen[0]], bias[seen[1]] = logistic.coef_[0], 0.0, logistic.intercept_[0]
    else:
        kernel[:, seen], bias[seen] = logistic.coef_.T, logistic.intercept_
    return Head(scaler.mean_, scaler.scale_, kernel, bias, strength)


# --- run --------------------------------------------------------------------------------------------------------------


def main(config: ProbeConfig) -> int:
    """Run `bestiary probe`; return the exit status."""
    with closing(RunFolder(config.out, config, frozenset({"out", "cache"}))) as run:
        probe(run, config, Progress())
    return 0


def probe(run: RunFolder, config: ProbeConfig, progress: Progress) -> None:
    """Compute features, fit a head to them, and write its predictions and metrics."""
    started = time.perf_counter()
    task, data = read_data(config)
    targets = np.array([example.label for example in data.train])
    if task.labels is not None and len(np.unique(targets)) < 2:
        raise DataError(f"{config.data}: all training examples have the same label; there is nothing to learn.")
    wanted = config.features
    if config.mix and wanted.layers == FeatureConfig.layers:
        wanted = dataclasses.replace(wanted, layers="all")
    extract = open_extractor(wanted, apart=config.mix)
    store = FeatureStore(extract, (config.cache or user_cache_folder()) / "features", progress)
    run.begin()
    splits = {"train": data.train, **data.evaluation, **data.prediction}
    vectors = {
        name: features_of(store, name, examples, config.pairs == "together") for name, examples in splits.items()
    }
    classes = None if task.labels is None else len(task.labels)
    mixed = learn_mix(vectors["train"], targets, classes) if config.mix else None
    if mixed is not None:
        vectors = {name: mixed(arrays) for name, arrays in vectors.items()}
    inputs = {name: np.asarray(joined(arrays)) for name, arrays in vectors.items()}
    progress.line(f"fitting a head to {len(targets):,} examples of {inputs['train'].shape[1]:,} features")
    head = fit_head(inputs["train"], targets, classes, config.strength, config.seed)
    metrics: dict[str, Any] = {}
    unused = pack_features([], [])  # the task's own encoding, which its metrics ignore
    for name, examples in splits.items():
        collected = Collected(segment={"logits": head(inputs[name])})
        if name in ("train", *data.evaluation):
            metrics[name] = task.metrics(collected, unused, examples)
        if name != "train":
            task.write_predictions(config.out / "predictions", name, collected, unused, examples)
    with replacing(config.out / "head.npz") as unfinished:
        np.savez(unfinished, **{key: value for key, value in head._asdict().items() if key != "strength"})
    write_json(
        config.out / "results.json",
        results(config, extract.settings, store.truncated, data, head, mixed, metrics, inputs, task.explained),
    )
    for name, values in metrics.items():
        progress.line(f"{name}: " + "  ".join(f"{metric} {value:.4f}" for metric, value in values.items()))
    progress.line(f"done in {duration(time.perf_counter() - started)}; results are in {config.out / 'results.json'}")


def results(
    config: ProbeConfig,
    settings: Settings,
    truncated: int,
    data: TaskData,
    head: Head,
    mixed: Mix | None,
    metrics: Mapping[str, Any],
    inputs: Mapping[str, np.ndarray],
    explained: Mapping[str, str],
) -> dict[str, Any]:
    """Return the content of results.json."""
    return {
        "task": config.task or "classification",
        "model": str(config.features.model),
        "seed": config.seed,
        "metrics": metrics,
        "explained": dict(explained),
        "layers": list(settings.layers),
        "pooling": list(settings.pooling),
        "mix": None if mixed is None else {"shares": mixed.shares, "gamma": mixed.gamma},
        "features": inputs["train"].shape[1],
        "training_examples": len(data.train),
        "truncated_tokens": truncated,
        "strength": head.strength,
        "versions": {name: version(name) for name in ("bestiary", "jax", "scikit-learn")},
    }
