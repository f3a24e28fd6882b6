"""The model to fine-tune: a checkpoint with the task's head, and the learning rates of its parts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ...data.progress import counted
from ...models.checkpoints.config import read_labels
from ...models.checkpoints.folder import Loaded, check_head, family_of_folder, load_with_report, read_config
from ...models.family import EncoderConfig
from ...models.heads.with_head import is_head_parameter
from ...models.once import jit_once
from ...models.recurrent.bilstm import BiLstmConfig
from ...models.registry import family_of_model, init_params
from ..adapt.layer_rates import both, boxed_shapes, layer_rates, parameter_depths
from ..errors import RunError
from ..learner import Learner, Names, compute_dtype, make_learner, scans
from ..optim.schedule import schedule
from ..progress import Progress
from .config import NEW_TAGGER, FinetuneConfig, TaggingConfig
from .tasks.tagging import features_shape
from .tasks.task import Task


def check_model(config: FinetuneConfig, task: Task) -> None:
    """Check the settings against the checkpoint's config.json, before data and weights are read.

    Raises:
        RunError: an example may be too long for the model, it has fewer layers than are to be frozen, or these share
            parameters with others.
        ConfigError: config.json is invalid.
        CheckpointError: the family is unknown, or has no such head.
    """
    if isinstance(config, TaggingConfig) and config.new:
        return
    stored = read_config(config.model)
    family = family_of_folder(stored, config.model)
    if family.reads != "text":
        raise RunError(f"{config.model}: {family.title} reads {family.reads}, not text. `bestiary images` trains it.")
    check_head(family, task.head, config.model)
    found: Any = family.config.from_json(stored)
    check_features(config, found, task)
    for flag, given in (("--auxiliary-lm", config.auxiliary_lm), ("--delimiters", config.delimiters)):
        if given and "causal_lm" not in family.heads:
            raise RunError(f"{flag}: {family.title} is no decoder, and predicts no next tokens.")
    if config.auxiliary_lm and task.head not in ("classification", "choice"):
        raise RunError(f"--auxiliary-lm: it is for tasks over whole examples, not for {task.name}.")
    if config.delimiters and (config.adapt.lora_rank or config.adapt.bitfit):
        raise RunError("--delimiters: adapters leave the vectors of new tokens as they are drawn. Leave one out.")
    if isinstance(found, BiLstmConfig):
        if config.adapt.lora_rank:
            raise RunError(f"--lora-rank: the LSTMs of {config.model} have no adapters. Leave it out, or use --bitfit.")
        if config.scan_layers is not None:
            raise RunError(f"--scan-layers: {config.model} has recurrent layers, which are not scanned. Leave it out.")
    if found.max_length is not None and task.max_length > found.max_length:
        raise RunError(f"--max-length is {task.max_length}, beyond the model's {found.max_length} positions.")
    if config.freeze_layers > found.layers:
        layers = counted(found.layers, "layer")
        raise RunError(f"--freeze-layers is {config.freeze_layers}, but the model has {layers}.")
    if found.sets is not None:
        apart = [n for n in range(1, found.layers + 1) if not set(found.sets[:n]) & set(found.sets[n:])]
        if config.freeze_layers not in (0, *apart):
            raise RunError(
                f"--freeze-layers is {config.freeze_layers}, but lower layers share their parameters with higher ones. "
                f"Freeze {' or '.join(map(str, apart))}."
            )


def check_features(config: FinetuneConfig, model: Any, task: Task) -> None:
    """Check that a checkpoint reads the states of such a frozen encoder as the task has, or of none.

    Raises:
        RunError: it does not.
    """
    wanted: Any = getattr(model, "features", ())
    given: Any = features_shape(task)
    if wanted and not given:
        raise RunError(f"{config.model}: it reads an ELMo's states; give its folder with --features.")
    if given and not wanted:
        raise RunError(f"--features: {config.model} reads no such states; --model {NEW_TAGGER} does.")
    if given != wanted:
        found, expected = (f"{count} layers of {size} numbers" for count, size in (given, wanted))
        raise RunError(f"--features: {found}, but {config.model} reads {expected}.")


def load_model(config: FinetuneConfig, task: Task, progress: Progress) -> Loaded:
    """Load the checkpoint with the task's head.

    Raises:
        CheckpointError: the family is unsuitable, or tensors do not fit.
        RunError: the folder has no tokenizer.
    """
    changes = task.model_changes()
    run = dict(
        dtype=compute_dtype(config.dtype),
        remat=config.remat,
        attention_implementation=config.attention,
    )
    loaded, report = load_with_report(config.model, head=task.head, seed=config.seed, **run, **changes)
    found: EncoderConfig = loaded.config
    scan = scans(config.scan_layers, found.layers)
    drop = {} if config.dropout is None else found.dropout_fields(config.dropout)
    shaped: EncoderConfig = dataclasses.replace(found, scan_layers=scan, **drop)
    loaded = loaded._replace(config=shaped, model=loaded.model.clone(config=shaped))
    new = list(report.initialised)
    names = changes.get("label_names")
    held = read_labels(read_config(config.model))[1]
    table = family_of_model(loaded.model)[0].checkpoint_table(loaded.model)
    head = {name for entry in table.entries if is_head_parameter(entry.path) for name in entry.names}
    if names is not None and names != held and head.isdisjoint(new):
        loaded = loaded._replace(params={**loaded.params, **new_head(loaded.model, config.seed)})
        new.append(f"the head, whose classes are {', '.join(held or ['not named'])}")
    delimited = config.delimiters
    if delimited is None:
        adapters = config.adapt.lora_rank or config.adapt.bitfit
        delimited = family_of_model(loaded.model)[0].delimited and not adapters
    if delimited and loaded.tokenizer is not None:
        loaded = with_delimiters(loaded, config.seed)
        added = loaded.tokenizer.tokens[shaped.vocab_size :]
        if added:
            new.append(f"the vectors of {', '.join(added)}")
    if new:
        progress.line(f"newly initialised (not in checkpoint {config.model}): {', '.join(new)}")
    if config.layer_decay != 1.0 and shaped.sets is not None:
        last = {number: layer + 1 for layer, number in enumerate(shaped.sets)}
        layers = ", ".join(map(str, sorted(last.values())))
        progress.line(f"--layer-decay: layers share parameters, which have the rates of layers {layers}")
    return loaded


DELIMITERS = ("_start_", "_delimiter_", "_classify_")


def with_delimiters(loaded: Loaded, seed: int) -> Loaded:
    """Return a decoder that reads `_start_ A _delimiter_ B _classify_`: its tokenizer and its word vectors have them.

    New vectors are drawn as in a new model. What has the tokens already stays as it is.
    """
    tokenizer = loaded.tokenizer.delimited(*DELIMITERS)
    config: Any = loaded.config
    lacking = tokenizer.vocab_size - config.vocab_size
    if lacking <= 0:
        return loaded._replace(tokenizer=tokenizer)
    config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    new = config.initializer(jax.random.key(seed), (lacking, config.table_width), jnp.float32)
    encoder = loaded.params["encoder"]
    words = np.concatenate([encoder["embeddings"]["word"]["embedding"], np.asarray(new)])
    embeddings = {**encoder["embeddings"], "word": {"embedding": words}}
    params = {**loaded.params, "encoder": {**encoder, "embeddings": embeddings}}
    return Loaded(loaded.model.clone(config=config), params, config, tokenizer)


def new_head(model: Any, seed: int) -> dict[str, Any]:
    """Initialise everything but a model's encoder."""

    def draw(key: jax.Array) -> dict[str, Any]:
        params = nn.unbox(init_params(model, key))
        return {name: part for name, part in params.items() if is_head_parameter((name,))}

    return jax.device_get(jit_once(draw)(jax.random.key(seed)))


def make_optimiser(
    config: FinetuneConfig, task: Task, loaded: Loaded, steps: int, chosen: Callable[[Names], bool] | None = None
) -> Learner:
    """Return the learner, with the learning rates of the layers and the task; nothing is computed yet.

    Args:
        config: settings of the run.
        task: task of the run.
        loaded: the model.
        steps: number of steps of the run.
        chosen: path of a parameter -> whether it may be trained; None: all may.
    """
    boxed = boxed_shapes(loaded.model)
    trains, scales = layer_rates(config, parameter_depths(loaded.model), electra=config.electra_layer_decay)
    return make_learner(
        # The weights come from the checkpoint: initialising others first would only take time to compile.
        lambda _: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), boxed),
        optim=config.optim,
        rate=schedule(config.optim, [(steps, None)]),
        seed=config.seed,
        trains=both(trains, chosen),
        scales=task_rates(task, scales),
    )


def task_rates(task: Task, scales: Callable[[Names], Any] | None) -> Callable[[Names], Any] | None:
    """Return the factors of the learning rates, including the task's own."""
    if not task.rates:
        return scales
    return lambda names: jnp.float32(task.rates.get(names[0], 1.0)) * (1.0 if scales is None else scales(names))
