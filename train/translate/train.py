"""Train a translator: the Transformer of Vaswani et al. 2017, from parallel text to a checkpoint folder.

    bestiary translate train                            English-German dates, durations, amounts and quantities, minutes
    bestiary translate train --source train.en.gz --target train.de.gz --dev val.en.gz val.de.gz \
        --preset transformer-tiny --out runs/ende

Several pairs share a row, on both sides (data/rows/translation.py). Label smoothing, Adam (0.9, 0.98) and the inverse
square root schedule are the paper's (5.3, 5.4); everything else - sampled subwords, R-Drop, averaged checkpoints, a
moving average of the weights, early stopping by the dev set's BLEU - is off by default.

A run starts from, in this order: (1) its own newest whole checkpoint, (2) the checkpoint named by --resume-from,
(3) the weights named by --init-from, (4) scratch.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from ...data import Tokenizer
from ...data.rows.translation import TranslationRows
from ...data.stream import evaluation_batches, training_batches
from ...data.tokenizers.kinds import TextKind
from ...data.tokenizers.pairs import TEXT, PairTokenizer, text_pairs
from ...models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from ...models.encoder_decoders.marian import from_transformer
from ...models.encoder_decoders.transformer import Transformer, TransformerConfig
from ...models.heads.losses import SmoothedSums
from ...models.registry import family_of, init_params, presets
from ..checkpoint import read_params, write_params
from ..errors import RunError
from ..generate.config import DecodeConfig
from ..learner import (
    Learner,
    TrainState,
    compute_dtype,
    count_parameters,
    describe_dtype,
    ema_or_params,
    gradient_step,
    make_learner,
    on_host,
)
from ..loop import Best, Fitted, InitialWeights, Stop, Training
from ..metrics import Meter, Sums
from ..optim.schedule import schedule, warmup_steps
from ..run import Run, start_run
from ..sharding import Replicas
from ..vectors import vectors_weights
from .config import FREE, RECIPES, TranslateConfig, upgrade
from .data import Data, Texts, make_rows, prepare_data
from .score import Bleu, Scores, Scoring, bleu_language
from .translator import Translation, Translator, check_vocabulary, load_generator, longest_output

# --- model and optimiser ----------------------------------------------------------------------------------------------


def model_config(config: TranslateConfig, tokenizer: PairTokenizer) -> EncoderDecoderConfig:
    """Return the model's configuration: a preset, or that of the checkpoint it starts from.

    Raises:
        RunError: the vocabularies do not fit.
    """
    run: dict[str, Any] = dict(
        dtype=compute_dtype(config.dtype),
        scan_layers=config.scan_layers,
        remat=config.remat,
        attention_implementation=config.attention,
    )
    rates = {name: getattr(config, name) for name in DROPOUTS}
    if config.init_from is not None:
        loaded = load_generator(config.init_from)
        found, own = loaded.config, loaded.tokenizer
        check_vocabulary(found, tokenizer, str(config.init_from))
        own = text_pairs(own, where=str(config.init_from)) if isinstance(own, Tokenizer) else own
        if isinstance(own, PairTokenizer) and any(
            theirs.vocabulary != side.vocabulary
            for theirs, side in ((own.source, tokenizer.source), (own.target, tokenizer.target))
        ):
            raise RunError(f"--tokenizer {config.tokenizer}: other ids than those of {config.init_from}. Leave it out.")
        check_lengths(found, config)
        rates = {name: rate for name, rate in rates.items() if rate is not None and hasattr(found, name)}
        return dataclasses.replace(found, **run, **rates)
    if tokenizer.kind == TEXT:
        return text_model(config, tokenizer, run)
    if config.preset not in RECIPES:
        raise RunError(
            f"--tokenizer {config.tokenizer}: a translator's; {config.preset} needs the folder of a text tokenizer."
        )
    source, target = tokenizer.source, tokenizer.target
    sizes: dict[str, Any] = dict(
        vocab_size=source.size,
        target_vocab_size=None if tokenizer.joint else target.size,
        tying=config.tying or ("all" if tokenizer.joint else "decoder"),
        pad_token_id=target.pad_id,
        eos_token_id=target.eos_id,
        bos_token_id=target.bos_id,
        decoder_start_token_id=target.pad_id,
    )
    of: Any = presets()[config.preset].config
    rates = {name: rate for name, rate in rates.items() if rate is not None}
    if issubclass(of, TransformerConfig):
        sizes |= {"positions": max(512, *config.lengths), "pre_norm": config.pre_norm}
    elif unknown := [name for name in ("pre_norm", *DROPOUTS[1:]) if getattr(config, name)]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in unknown)
        raise RunError(f"{flags}: {config.preset} is a recurrent model, and has no such sub-layers. Leave it out.")
    else:
        rates = {"dropout": config.dropout}
    try:
        return of.preset(config.preset, **sizes, **run, **rates)
    except (ValueError, KeyError) as error:
        raise RunError(str(error)) from None


def check_lengths(found: EncoderDecoderConfig, config: TranslateConfig) -> None:
    """Raise RunError if a row may be longer than the model's positions."""
    longest = max(config.lengths)
    if found.max_length is not None and longest > found.max_length:
        raise RunError(f"Rows of {longest} tokens are beyond the model's {found.max_length} positions.")


DROPOUTS = ("dropout", "attention_dropout", "activation_dropout")


def text_model(config: TranslateConfig, tokenizer: PairTokenizer, run: Mapping[str, Any]) -> EncoderDecoderConfig:
    """Return the configuration of a new text-to-text model of a released size.

    Raises:
        RunError: there is no such size, or it is of another kind of model.
    """
    family = presets().get(config.preset)
    if family is None or "generation" not in family.heads or family.tokenizers[0] not in get_args(TextKind):
        sizes = [name for name, of in presets().items() if of.objectives and "generation" in of.heads]
        raise RunError(f"{config.preset}: no size of a text-to-text model; expected one of {', '.join(sizes)}.")
    side = tokenizer.source
    ids = {"pad": side.pad_id, "eos": side.eos_id, **({} if side.bos_id is None else {"bos": side.bos_id})}
    of: Any = family.config
    found = of.preset(config.preset, **of.vocabulary_fields(side.size, ids), **run)
    check_lengths(found, config)
    rates = {name: getattr(config, name) for name in DROPOUTS}
    return dataclasses.replace(
        found, **{name: r for name, r in rates.items() if r is not None and hasattr(found, name)}
    )


def make_model(config: TranslateConfig, architecture: EncoderDecoderConfig) -> tuple[EncoderDecoder, Learner]:
    """Return the model and its learner; nothing is computed yet."""
    model = family_of(architecture).build("generation", architecture)
    ids = jnp.zeros((1, 8), jnp.int32)
    learner = make_learner(
        lambda key: model.init(key, ids)["params"],
        optim=config.optim,
        rate=schedule(config.optim, [(config.steps, None)]),
        seed=config.seed,
        trains=lambda names: "final_logits_bias" not in names,  # which is only loaded and saved
    )
    return model, learner


def released(model: EncoderDecoder, params: Any, tokenizer: PairTokenizer) -> tuple[EncoderDecoder, Any, PairTokenizer]:
    """Convert the model to an equivalent Marian model, which the reference implementation loads, if possible.

    With SentencePiece's subwords, padding becomes the last word, as CTranslate2 expects of Marian.
    """
    c = model.config
    if type(model) is not Transformer or c.pre_norm or c.table_width != c.width:
        return model, params, tokenizer
    one_size = c.vocab_size == c.target_words  # config.json has one id of padding for both sides
    last = tokenizer.can_have_padding_last and one_size and c.decoder_start_token_id == c.pad_token_id
    converted, moved = from_transformer(model, params, padding_last=last)
    return converted, moved, tokenizer.with_padding_last() if last else tokenizer


# --- step -------------------------------------------------------------------------------------------------------------

INPUTS = (
    "input_ids", "segment_ids", "position_ids", "decoder_input_ids", "decoder_segment_ids", "decoder_position_ids",
)  # fmt: skip


def smoothed_sums(
    model: EncoderDecoder, params: Any, batch: dict[str, jax.Array], *dropout: jax.Array, **kwargs: Any
) -> SmoothedSums:
    """Return the summed losses of a batch: of one pass per key of `dropout`, or of one without dropout."""
    passes = [
        model.apply(
            {"params": params},
            *(batch[name] for name in INPUTS),
            rows=batch["rows"],
            deterministic=key is None,
            rngs=None if key is None else {"dropout": key},
            method="output_states",
        )
        for key in dropout or (None,)
    ]
    found: Any = model.apply(
        {"params": params}, passes, batch["labels"], batch["label_weights"], method="loss", **kwargs
    )
    return found


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    replicas: Replicas,
    *,
    model: EncoderDecoder,
    learner: Learner,
    smoothing: float,
    r_drop: float,
    accumulate: int,
) -> tuple[TrainState, Sums]:
    """Do one update: minimise the mean smoothed loss over the batch's target tokens."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    batch = {**batch, "rows": replicas.rows(batch["input_ids"].shape[0])}
    tokens = replicas.sum((batch["segment_ids"] > 0).sum())
    targets = replicas.sum(batch["label_weights"].sum())
    weight = jnp.maximum(targets, 1.0)
    keys = [jax.random.fold_in(key, number) for number in (0, 1)] if r_drop else [key]

    def loss(params: Any, part: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        sums = smoothed_sums(model, params, part, *keys, label_smoothing=smoothing, r_drop=r_drop)
        return sums.loss / weight, sums

    state, sums, norm = gradient_step(state, batch, replicas, learner=learner, loss=loss, accumulate=accumulate)
    one = jnp.float32(1)
    metrics = {
        "loss": (sums.loss, sums.weight),
        "nll": (sums.nll, sums.weight),
        "accuracy": (sums.correct, sums.weight),
        "gradient_norm": (norm, one),
        "target_tokens": (targets, one),
        "source_tokens_per_step": (tokens.astype(jnp.float32), one),
    }
    return state, {**metrics, "divergence": (sums.divergence, targets)} if r_drop else metrics


def evaluation_step(params: Any, batch: dict[str, jax.Array], replicas: Replicas, *, model: EncoderDecoder) -> Sums:
    """Compute sums over held-out rows."""
    batch = {**batch, "rows": replicas.rows(batch["input_ids"].shape[0])}
    sums = replicas.sum(smoothed_sums(model, params, batch))
    return {"nll": (sums.nll, sums.weight), "accuracy": (sums.correct, sums.weight)}


# --- evaluation -------------------------------------------------------------------------------------------------------


class Evaluation:
    """Evaluation: the dev set's loss, and its BLEU if it is translated.

    Every process translates the whole set, on one of its devices. As in `translate score`, sources longer than a row
    are translated in parts, and empty ones to nothing.
    """

    def __init__(
        self,
        run: Run,
        config: TranslateConfig,
        data: Data,
        model: EncoderDecoder,
        keep: "Means",
        scoring: Scoring | None = None,
    ):
        self._tokenizer, self._parallelism, self._keep = data.tokenizer, run.parallelism, keep
        rows = make_rows(config, data, model.config.decoder_start_token_id, run.progress, dev=True)
        index, count = run.parallelism.share(config.rows)
        self.batches = partial(evaluation_batches, rows, batch_rows=config.rows, host_index=index, host_count=count)
        self._step = run.parallelism.compile_evaluate(partial(evaluation_step, model=model))
        self._references = [pair.target for pair in data.dev]
        self._sources = [pair.source for pair in data.dev]
        longest = max(len(ids) + 1 for ids in data.tokenizer.encode_source(self._sources))
        self._row_tokens, self._too_long = config.lengths[0], config.sources_too_long
        self._most = config.longest_output or longest_output(model.config, min(longest, self._row_tokens))
        self._model, self._beam = model, config.dev_beam
        self._translators: dict[int, Translator] = {}
        self._scoring = scoring or Bleu(data.tokenizer.form)
        self.deciding = self._scoring.deciding

    def translate(self, params: Any, beam: int) -> list[Translation]:
        """Translate the dev set with parameters on the host."""
        if beam in self._translators:
            self._translators[beam] = self._translators[beam].with_params(params)
        else:
            decode = DecodeConfig(beam=beam, max_length=self._most)
            how: Any = {"longest": self._row_tokens, "too_long": self._too_long}
            self._translators[beam] = Translator(self._model, params, self._tokenizer, decode, **how)
        return [found[0] for found in self._translators[beam].translate(self._sources)]

    def scores(self, translations: Sequence[Translation]) -> Scores:
        """Score translations of the dev set."""
        return self._scoring(translations, self._references)

    def __call__(self, state: TrainState, stop: Stop) -> dict[str, float] | None:
        params = ema_or_params(state)
        meter = Meter()
        for batch in self.batches():
            meter.add(jax.device_get(self._step(params, self._parallelism.shard_batch(batch))))
            if stop.requested:
                return None
        params = on_host(params)
        scores = self.scores(self.translate(params, self._beam)).values
        if stop.requested:
            return None
        self._keep(int(on_host(state.step)), params, scores[self.deciding])
        return {**meter.means(), **scores}


class Means:
    """Weights saved at evaluations for averaging: `weights/STEP_FIGURE.safetensors` in the run folder."""

    def __init__(self, folder: Path, config: TranslateConfig):
        self._folder, self._count, self._of = folder / "weights", config.average, config.average_of

    def __call__(self, step: int, params: Any, figure: float) -> None:
        """Save an evaluation's weights, and delete those no longer needed."""
        if not self._count or jax.process_index() > 0:
            return
        self._folder.mkdir(exist_ok=True)
        for path in self._files():
            if self._step(path) >= step:  # left by an interrupted run beyond its last checkpoint
                path.unlink()
        write_params(self._folder / f"{step}_{figure:.6f}.safetensors", params)
        for path in self._files()[: -self._count]:
            path.unlink()

    def mean(self) -> tuple[Any, list[int]]:
        """Return the mean of the weights, and their steps; (None, []) if none were saved."""
        files = self._files()
        total: Any = None
        for path in files:
            params = jax.tree.map(lambda leaf: leaf.astype(np.float64), read_params(path))
            total = params if total is None else jax.tree.map(np.add, total, params)
        if total is None:
            return None, []
        mean = jax.tree.map(lambda leaf: (leaf / len(files)).astype(np.float32), total)
        return mean, sorted(map(self._step, files))

    @staticmethod
    def _step(path: Path) -> int:
        return int(path.stem.split("_")[0])

    def _files(self) -> list[Path]:
        """Return the files, worst first."""
        files = [path for path in self._folder.glob("*.safetensors") if re.fullmatch(r"\d+_-?[\d.]+", path.stem)]
        if self._of == "last":
            return sorted(files, key=self._step)
        return sorted(files, key=lambda path: (float(path.stem.split("_")[1]), self._step(path)))


# --- run --------------------------------------------------------------------------------------------------------------


def describe(
    run: Run, config: TranslateConfig, rows: TranslationRows, model: EncoderDecoderConfig, params: Any
) -> None:
    """Describe the run and its data."""
    statistics = rows.statistics()
    run.progress.line(f"an epoch: {statistics}; {statistics.rows / config.rows:,.1f} updates")
    run.progress.line(
        f"model: {model.size_in_words}, {model.width} wide, vocabulary "
        f"{model.vocab_size:,}, {count_parameters(params):,} parameters, in {describe_dtype(model.dtype)}, on "
        f"{run.devices}"
    )


def figures(
    data: Data, fitted: Fitted, held_out: Mapping[str, float | str], means: list[int], parameters: int, deciding: str
) -> dict[str, Any]:
    """Return the part of results.json that is specific to translation."""
    return {
        "parameters": parameters,
        "held_out": dict(held_out),
        "best": None if fitted.best is None else {"step": fitted.best[0], deciding: fitted.best[1]},
        "mean_of_steps": means,
        "target_tokens": fitted.totals["target_tokens"],
        "target_tokens_per_second": fitted.rate("target_tokens"),
        "text": dataclasses.asdict(data.train.counts),
        "sacrebleu": version("sacrebleu"),
    }


def translate(
    run: Run,
    config: TranslateConfig,
    task: str = "translate",
    scoring: Scoring | None = None,
    read: Callable[[], Texts] | None = None,
) -> int:
    """Train; return the exit status.

    Args:
        run: the run.
        config: its settings.
        task: name of the task, for results.json.
        scoring: figures of the outputs for the dev set; None: BLEU and chrF.
        read: opens the texts; None: those of the settings.
    """
    if config.rows % config.accumulate:
        raise RunError(f"A batch of {config.rows} rows cannot be computed in {config.accumulate} parts.")
    run.parallelism.share(config.rows // config.accumulate)
    if run.folder.finished:
        run.progress.line(f"{config.out} holds the finished run: its figures are in results.json, its model in model/")
        return 0
    if scoring is None:
        bleu_language(config.languages[1])  # a missing dictionary is reported before the work
    data = prepare_data(config, run.progress, read)
    architecture = model_config(config, data.tokenizer)
    model, learner = make_model(config, architecture)
    rows = make_rows(config, data, architecture.decoder_start_token_id, run.progress)
    describe(run, config, rows, architecture, learner.shapes().params)
    means = Means(config.out, config)
    evaluate = Evaluation(run, config, data, model, means, scoring)
    index, count = run.parallelism.share(config.rows)
    step = partial(
        train_step,
        model=model,
        learner=learner,
        smoothing=config.label_smoothing,
        r_drop=config.r_drop,
        accumulate=config.accumulate,
    )
    init, warmup = config.init_from, warmup_steps(config.optim, config.steps)
    initial = init and InitialWeights(lambda: load_generator(init).params, f"the weights of {init}")
    if config.vectors is not None:
        new = partial(init_params, model, jax.random.key(config.seed))
        sides = {"source": data.tokenizer.source, "target": data.tokenizer.target}
        tokens = {name: sorted(side.vocabulary, key=side.vocabulary.__getitem__) for name, side in sides.items()}
        initial = vectors_weights(config.vectors, new, tokens)
    training = Training(
        learner=learner,
        step=step,
        steps=config.steps,
        batches=training_batches(rows, batch_rows=config.rows, host_index=index, host_count=count),
        evaluate=evaluate,
        shown=("loss", "nll", "accuracy"),
        counted={"target_tokens": "target tokens/s"},
        initial=initial,
        best=Best(evaluate.deciding, config.patience, run.keep_best, counts_after=warmup),
    )
    fitted = run.fit(training)
    if fitted.stopped is not None:
        return fitted.exit_status
    last = on_host(ema_or_params(fitted.state))  # all processes take part
    best = run.best_params() if config.patience else last
    if run.main:  # only this process has the other weights
        params, over = means.mean()
        if params is None:
            params = best
        translations = evaluate.translate(params, config.final_beam)
        scores = evaluate.scores(translations)
        run.progress.line(f"dev, beam {config.final_beam}: {scores}")
        held = figures(
            data, fitted, scores.values | scores.signatures, over, count_parameters(params), evaluate.deciding
        )
        samples = [
            f"  {pair.source} → {found.text} ({'ok' if found.text == pair.target else f'for {pair.target}'})"
            for pair, found in list(zip(data.dev, translations, strict=True))[:5]
        ]
        tokenizer = data.tokenizer.with_longest(config.lengths[0])
        run.finish(*released(model, params, tokenizer), run.results(task, fitted, held), samples)
    return fitted.exit_status


def main(config: TranslateConfig) -> int:
    """Run `bestiary translate train`; return the exit status."""
    with start_run(config, FREE, upgrade=upgrade) as run:
        return translate(run, config)
