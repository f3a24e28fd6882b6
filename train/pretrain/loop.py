"""Pretrain BERT: masked words and next sentences (Devlin et al. 2018, 3.1), from text to a checkpoint folder.

    bestiary pretrain                               a small BERT on Python's own documentation, minutes on two cores
    bestiary pretrain --corpus books/ --tokenizer DIR --model bert-mini --sequence-length 512 --batch-tokens 65536 \
        --steps 20000 --mesh data=8 --out runs/mini

A run starts from, in this order: (1) its own newest whole checkpoint, (2) the checkpoint named by --resume-from,
(3) the weights named by --init-from, (4) scratch.
"""

import dataclasses
import hashlib
import os
import shutil
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from ...data import (
    EMBEDDED,
    Corpus,
    SentencePairRows,
    TokenCache,
    Tokenizer,
    build_cache,
    evaluation_batches,
    load_tokenizer,
    train_wordpiece,
    training_batches,
)
from ...data.corpus.fingerprint import corpus_fingerprint
from ...models import load, save
from ...models.bert import BertConfig, BertForPreTraining
from ...models.heads import encoder_inputs
from ...models.losses import PredictionSums, prediction_sums
from ..errors import RunError
from ..learner import (
    Learner,
    Start,
    compute_dtype,
    count_parameters,
    describe_dtype,
    exit_status,
    gradient_step,
    learn,
    make_learner,
    on_host,
)
from ..loop import Fitted, Stop, TrainState
from ..metrics import Meter, Sums
from ..optim import schedule
from ..progress import Progress, duration
from ..run_folder import RunFolder
from ..sharding import Replicas, Spread, start_spread
from .config import FREE, Phase, PretrainConfig, parse_phases
from .masking import Masking
from .samples import fill_in

# --- model and optimiser ----------------------------------------------------------------------------------------------


def model_config(config: PretrainConfig, tokenizer: Tokenizer) -> BertConfig:
    """The model's configuration: a preset, or that of the checkpoint it starts from.

    Raises:
        RunError: the vocabularies or the lengths do not fit.
    """
    run = dict(
        dropout=config.dropout,
        attention_dropout=config.dropout,
        dtype=compute_dtype(config.dtype),
        scan_layers=config.scan_layers,
        remat=config.remat,
        attention_implementation=config.attention,
    )
    if config.init_from is not None:
        found = load(config.init_from, head="pretraining").config
        if found.vocab_size != tokenizer.vocab_size:
            raise RunError(
                f"{config.init_from} has a vocabulary of {found.vocab_size}, the tokenizer one of "
                f"{tokenizer.vocab_size}. Give the checkpoint's own with --tokenizer {config.init_from}."
            )
        model = dataclasses.replace(found, **run)
    else:
        model = BertConfig.preset(config.model, vocab_size=tokenizer.vocab_size, **run)
    longest = max(phase.length for phase in parse_phases(config))
    if longest > model.positions:
        raise RunError(f"The sequence length {longest} is beyond the model's {model.positions} positions.")
    return model


def make_model(config: PretrainConfig, architecture: BertConfig) -> tuple[BertForPreTraining, Learner]:
    """The model and how it is trained; nothing is computed yet."""
    model = BertForPreTraining(architecture)
    ids = jnp.zeros((1, 8), jnp.int32)
    rate = schedule(config.optim, [(phase.steps, phase.learning_rate) for phase in parse_phases(config)])
    learner = make_learner(lambda key: model.init(key, ids)["params"], optim=config.optim, rate=rate, seed=config.seed)
    return model, learner


# --- step -------------------------------------------------------------------------------------------------------------


def make_masking(config: PretrainConfig, tokenizer: Tokenizer) -> Masking:
    """The masking that the configuration asks for, over this vocabulary."""
    return Masking(config.masking, config.mask_rate, tokenizer.mask_id, tokenizer.special, tokenizer.continuation)


def mask_batch(
    masking: Masking, key: jax.Array, batch: dict[str, jax.Array], replicas: Replicas
) -> dict[str, jax.Array]:
    """Hide tokens; the result has what the model and the losses take, and the rows' numbers."""
    masked = masking(key, batch["input_ids"], batch["segment_ids"], batch["row_ids"])
    return {
        **{name: batch[name] for name in BATCH_FIELDS},
        "input_ids": masked.input_ids,
        "mlm_positions": masked.positions,
        "mlm_labels": masked.labels,
        "mlm_weights": masked.weights,
        "rows": replicas.rows(batch["input_ids"].shape[0]),
    }


BATCH_FIELDS = (
    "segment_ids", "position_ids", "token_type_ids", "cls_positions", "next_sentence_labels", "next_sentence_weights",
)  # fmt: skip


def forward(model: BertForPreTraining, params: Any, batch: dict[str, jax.Array], **kwargs: Any) -> Any:
    """(MLM, NSP) `PredictionSums` of a masked batch."""
    logits: Any = model.apply(
        {"params": params},
        *encoder_inputs(model.config, batch),
        mlm_positions=batch["mlm_positions"],
        cls_positions=batch["cls_positions"],
        rows=batch["rows"],
        **kwargs,
    )
    return (
        prediction_sums(logits.mlm_logits, batch["mlm_labels"], batch["mlm_weights"]),
        prediction_sums(logits.nsp_logits, batch["next_sentence_labels"], batch["next_sentence_weights"]),
    )


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    replicas: Replicas,
    *,
    model: BertForPreTraining,
    learner: Learner,
    masking: Masking,
    accumulate: int,
) -> tuple[TrainState, Sums]:
    """One update: the mean MLM loss plus the mean NSP loss, over the whole batch."""
    mask_key, dropout_key = jax.random.split(jax.random.wrap_key_data(state.key))
    dropout_key = jax.random.fold_in(dropout_key, state.step)
    tokens = replicas.sum((batch["segment_ids"] > 0).sum())
    masked = mask_batch(masking, mask_key, batch, replicas)
    weights = (masked["mlm_weights"].sum(), masked["next_sentence_weights"].sum())
    mlm_weight, nsp_weight = (jnp.maximum(weight, 1.0) for weight in replicas.sum(weights))

    def loss(params: Any, part: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        mlm, nsp = forward(model, params, part, deterministic=False, rngs={"dropout": dropout_key})
        return mlm.loss / mlm_weight + nsp.loss / nsp_weight, (mlm, nsp)

    state, (mlm, nsp), norm = gradient_step(state, masked, replicas, learner=learner, loss=loss, accumulate=accumulate)
    one = jnp.float32(1)
    return state, {
        "loss": (mlm.loss / mlm_weight + nsp.loss / nsp_weight, one),
        **_prediction_metrics(mlm, nsp),
        "gradient_norm": (norm, one),
        "tokens": (tokens, one),
    }


def evaluation_step(
    params: Any,
    batch: dict[str, jax.Array],
    replicas: Replicas,
    *,
    model: BertForPreTraining,
    masking: Masking,
    key: jax.Array,
) -> Sums:
    """Sums over held-out rows, masked in the same way every time."""
    masked = mask_batch(masking, key, batch, replicas)
    mlm, nsp = replicas.sum(forward(model, params, masked, deterministic=True))
    return _prediction_metrics(mlm, nsp)


def _prediction_metrics(mlm: PredictionSums, nsp: PredictionSums) -> Sums:
    return {
        "mlm_loss": (mlm.loss, mlm.weight),
        "mlm_accuracy": (mlm.correct, mlm.weight),
        "nsp_loss": (nsp.loss, nsp.weight),
        "nsp_accuracy": (nsp.correct, nsp.weight),
    }


# --- data -------------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """The tokenised text of a run."""

    tokenizer: Tokenizer
    train: TokenCache
    validation: TokenCache  # the same cache where a share of the documents is held out


def prepare_data(config: PretrainConfig, progress: Progress) -> Data:
    """Tokenizer and cache, made where they are missing: by process 0 first, then opened by the others."""
    if jax.process_index() > 0:
        multihost_utils.sync_global_devices("data_prepared")
    root = config.cache or user_cache_folder()
    options: Any = dict(encoding=config.encoding, text_field=config.text_field, blank_line=config.blank_line)
    corpus = Corpus(config.corpus or (EMBEDDED,), **options)
    held_out = Corpus(config.validation_corpus, **options) if config.validation_corpus else None

    def show(report: Any) -> None:
        progress.update(str(report))

    folder = config.tokenizer or trained_tokenizer(config, corpus, root / "tokenizers", show)
    tokenizer = load_tokenizer(folder)
    build = partial(
        build_cache,
        tokenizer=tokenizer,
        root=root / "tokenised",
        language=config.language,
        processes=config.workers or None,
        progress=show,
    )
    train = build(corpus)
    validation = train if held_out is None else build(held_out)
    if jax.process_index() == 0 and jax.process_count() > 1:
        multihost_utils.sync_global_devices("data_prepared")
    return Data(tokenizer, train, validation)


def trained_tokenizer(config: PretrainConfig, corpus: Corpus, root: Path, show: Any) -> Path:
    """The folder of a WordPiece tokenizer of this corpus; trained if it is not there yet."""
    key = f"wordpiece {config.vocab_size} {config.lowercase} {corpus_fingerprint(corpus)}"
    folder = root / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not folder.is_dir():
        unfinished = root / f"{folder.name}.{os.getpid()}"
        trained = train_wordpiece(corpus, vocab_size=config.vocab_size, lowercase=config.lowercase, progress=show)
        trained.save(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another run has just made the same one
                raise
            shutil.rmtree(unfinished)
    return folder


def user_cache_folder() -> Path:
    """`bestiary` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bestiary"


def dataset(
    config: PretrainConfig, data: Data, length: int, split: Literal["train", "validation"] = "train"
) -> SentencePairRows:
    """Rows of one sequence length: those that are trained on, or those that are held out, alike for every seed."""
    training = split == "train"
    return SentencePairRows(
        data.train if training else data.validation,
        data.tokenizer,
        "all" if config.validation_corpus else split,
        sequence_length=length,
        seed=config.seed if training else 0,
        copies=(config.static_masks or None) if training else None,
        next_sentence=config.next_sentence,
        validation_fraction=config.validation_fraction,
    )


class PhasedBatches:
    """The training batches of all phases, one after the other. The state is JSON: which phase, and where in it."""

    def __init__(self, config: PretrainConfig, data: Data, share: Any):
        self._phases = parse_phases(config)
        self._open = partial(_open_phase, config, data, share)
        self._phase, self._done, self._batches = 0, 0, self._open(self._phases[0].length)

    def __next__(self) -> dict[str, np.ndarray]:
        while self._done == self._phases[self._phase].steps:
            self._phase, self._done = self._phase + 1, 0
            self._batches = self._open(self._phases[self._phase].length)
        self._done += 1
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        return {"phase": self._phase, "done": self._done, "batches": self._batches.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        if state["phase"] != self._phase:
            self._batches = self._open(self._phases[state["phase"]].length)
        self._phase, self._done = state["phase"], state["done"]
        self._batches.set_state(state["batches"])


def _open_phase(config: PretrainConfig, data: Data, share: Any, length: int) -> Any:
    rows = config.batch_tokens // length
    index, count = share(rows)
    return training_batches(dataset(config, data, length), batch_rows=rows, host_index=index, host_count=count)


# --- run --------------------------------------------------------------------------------------------------------------


class Evaluation:
    """Held-out means, over the same rows with the same masks every time."""

    def __init__(
        self,
        config: PretrainConfig,
        data: Data,
        model: BertForPreTraining,
        learner: Learner,
        masking: Masking,
        spread: Spread,
    ):
        length = parse_phases(config)[-1].length
        rows = config.batch_tokens // length
        index, count = spread.share(rows)
        self.batches = partial(
            evaluation_batches,
            dataset(config, data, length, "validation"),
            batch_rows=rows,
            host_index=index,
            host_count=count,
            rows=config.evaluation_rows or None,
        )
        step = partial(evaluation_step, model=model, masking=masking, key=jax.random.key(0))
        self._step, self._spread = spread.evaluate(step, learner.specs), spread

    def __call__(self, state: TrainState, stop: Stop) -> dict[str, float] | None:
        meter = Meter()
        for batch in self.batches():
            meter.add(self._spread.fetch(self._step(state.params, self._spread.put(batch))))
            if stop.signal is not None and jax.process_count() == 1:
                return None
        means = meter.means()
        return {"loss": means["mlm_loss"] + means["nsp_loss"], **means}


def describe(config: PretrainConfig, data: Data, architecture: BertConfig, params: Any, progress: Progress) -> None:
    """Say what is about to be done, and what the data came to."""
    counts = data.train.counts
    progress.line(
        f"corpus: {counts.documents:,} documents ({counts.empty_documents:,} empty), {counts.sentences:,} sentences, "
        f"{counts.tokens:,} tokens, {counts.unknown_tokens:,} of them unknown"
    )
    for phase in parse_phases(config):
        progress.line(f"rows of {phase.length}: {dataset(config, data, phase.length).statistics(0, windows=8)}")
    devices = jax.devices()
    progress.line(
        f"model: {architecture.layers} layers, {architecture.width} wide, vocabulary {architecture.vocab_size:,}, "
        f"{count_parameters(params):,} parameters, computed in {describe_dtype(architecture.dtype)}, on "
        f"{len(devices)} x {devices[0].device_kind} (--parallel {config.spread.parallel} --mesh {config.spread.mesh})"
    )


def results(config: PretrainConfig, data: Data, fitted: Fitted, parameters: int, run: RunFolder) -> dict[str, Any]:
    """The content of results.json."""
    records = run.metrics()
    held_out = [record for record in records if "eval/loss" in record][-1]
    training = [record for record in records if "loss" in record][-1]
    return {
        "task": "pretrain",
        "steps": fitted.step,
        "seed": config.seed,
        "parameters": parameters,
        "held_out": {key.removeprefix("eval/"): value for key, value in held_out.items() if key != "step"},
        "training": {key: value for key, value in training.items() if key != "step"},
        "real_tokens": fitted.totals["tokens"],
        "seconds_in_steps": fitted.seconds,
        "real_tokens_per_second": fitted.rate("tokens"),
        "corpus": dataclasses.asdict(data.train.counts),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {name: version(name) for name in ("bestiary", "jax", "flax", "optax")},
    }


def pretrain(config: PretrainConfig, stop: Stop) -> int:
    """Run; returns the exit status."""
    started = time.perf_counter()
    spread = start_spread(config.spread)
    main_process = jax.process_index() == 0
    progress = Progress(shown=main_process)
    phases = parse_phases(config)
    for phase in phases:
        check_batch(config, phase, spread)
    run = RunFolder(config.out, config, FREE)
    data = prepare_data(config, progress)
    architecture = model_config(config, data.tokenizer)
    model, learner = make_model(config, architecture)
    describe(config, data, architecture, learner.shapes().params, progress)
    masking = make_masking(config, data.tokenizer)
    evaluate = Evaluation(config, data, model, learner, masking, spread)
    weights = None if config.init_from is None else partial(_weights, config.init_from, config.seed)
    fitted = learn(
        run=run,
        loop=config.loop,
        learner=learner,
        spread=spread,
        step=partial(train_step, model=model, learner=learner, masking=masking, accumulate=config.accumulate),
        steps=sum(phase.steps for phase in phases),
        batches=PhasedBatches(config, data, spread.share),
        evaluate=evaluate,
        start=Start(config.resume_from, weights, f"the weights of {config.init_from}"),
        show=("loss", "mlm_loss", "mlm_accuracy", "nsp_accuracy"),
        counts={"tokens": "real tokens/s"},
        progress=progress,
        stop=stop,
    )
    if fitted.stopped is not None:
        return exit_status(fitted)
    params = on_host(fitted.state.params)
    if main_process:
        save(config.out / "model", model, params, data.tokenizer)
        run.finish(results(config, data, fitted, count_parameters(params), run))
        for line in fill_in(model, params, data.tokenizer, next(iter(evaluate.batches()))):
            progress.line(f"  {line}")
        progress.line(f"done in {duration(time.perf_counter() - started)}; the model is in {config.out / 'model'}")
    run.close()
    return 0


def _weights(folder: Path, seed: int) -> Any:
    return load(folder, head="pretraining", seed=seed).params


def check_batch(config: PretrainConfig, phase: Phase, spread: Spread) -> None:
    """Raise RunError unless a phase's batch divides by --accumulate and by the devices."""
    rows = config.batch_tokens // phase.length
    if rows == 0 or rows % config.accumulate:
        raise RunError(
            f"A batch of {rows} rows ({config.batch_tokens} tokens) cannot be computed in {config.accumulate} parts."
        )
    spread.share(rows // config.accumulate)


def main(config: PretrainConfig) -> int:
    """`bestiary pretrain`; returns the exit status."""
    with Stop() as stop:
        return pretrain(config, stop)
