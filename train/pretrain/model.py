"""The model to pretrain: a released size, or the checkpoint that a run starts from."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from ...data import Tokenizer
from ...data.tokenizers.kinds import TITLES
from ...models import load
from ...models.checkpoints.folder import family_of_folder, load_with_report, read_config
from ...models.checkpoints.tables import Params, flatten
from ...models.checkpoints.teacher import Teacher
from ...models.encoders.electra import ElectraConfig, together
from ...models.family import EncoderConfig, Family
from ...models.registry import family_of, init_params, presets
from ..arguments import did_you_mean
from ..errors import RunError
from ..learner import Learner, compute_dtype, make_learner
from ..loop import InitialWeights
from ..optim.schedule import schedule
from .config import DistillConfig, PretrainConfig


def asked_family(config: PretrainConfig) -> Family:
    """Return the family of the requested model.

    Raises:
        RunError: there is no model of that name.
    """
    if config.init_from is not None:
        return family_of_folder(read_config(config.init_from), config.init_from)
    if isinstance(config, DistillConfig) and config.model == "half":
        return family_of_folder(read_config(config.teacher), config.teacher)
    known = presets()
    if config.model not in known:
        learn = [name for name, family in known.items() if family.objectives]
        meant = did_you_mean(config.model, learn) or f" Expected one of {', '.join(learn)}."
        raise RunError(f"--model {config.model}: there is no such size.{meant}")
    return known[config.model]


def model_config(config: PretrainConfig, tokenizer: Tokenizer, head: str) -> EncoderConfig:
    """Return the model's configuration: a preset, or that of the checkpoint it starts from.

    Args:
        config: settings of the run.
        tokenizer: tokenizer, which determines vocabulary size and padding token of a new model.
        head: head of the model.

    Raises:
        RunError: the vocabularies or the lengths do not fit.
    """
    dtype = compute_dtype(config.dtype)
    if config.dtype == "auto" and dtype not in asked_family(config).config.DTYPES:
        dtype = "float32"
    run: dict[str, Any] = dict(
        dtype=dtype,
        scan_layers=config.scan_layers,
        remat=config.remat,
        **({} if config.generator_size is None else {"generator_fraction": config.generator_size}),
        **({} if config.memory is None else {"memory": config.memory}),
        attention_implementation=config.attention,
        **({"shared_dropout": True} if config.shared_dropout else {}),
    )
    if config.init_from is not None:
        loaded = load(config.init_from, head=head)
        found: Any = loaded.config
        # An embedding table may have more rows than the vocabulary. Without a tokenizer in the folder, only one that is
        # padded to a multiple of at most 128 shows that it is this vocabulary's.
        own = loaded.tokenizer is None or loaded.tokenizer.tokens == tokenizer.tokens
        padding = found.vocab_size - tokenizer.vocab_size
        if not own or padding < 0 or (loaded.tokenizer is None and padding >= 128):
            raise RunError(
                f"{config.init_from} has a vocabulary of {found.vocab_size}, the tokenizer one of "
                f"{tokenizer.vocab_size}. Give the checkpoint's own with --tokenizer {config.init_from}."
            )
    else:
        found = new_config(config, tokenizer)
    try:
        model = dataclasses.replace(found, **run, **found.dropout_fields(config.dropout))
    except ValueError as error:
        raise RunError(f"{error}.") from None
    longest = max(phase.length for phase in config.plan)
    if model.max_length is not None and longest > model.max_length:
        raise RunError(f"The sequence length {longest} is beyond the model's {model.max_length} positions.")
    return model


def new_config(config: PretrainConfig, tokenizer: Tokenizer) -> Any:
    """Return the configuration of a model of the requested size, with a tokenizer's vocabulary."""
    sizes: Any = asked_family(config).config
    vocabulary = sizes.vocabulary_fields(tokenizer.vocab_size, tokenizer.special_ids)
    if not isinstance(config, DistillConfig) or config.model != "half":
        return sizes.preset(config.model, **vocabulary)
    whole = sizes.from_json(read_config(config.teacher))
    try:
        return dataclasses.replace(whole, layers=max(1, whole.layers // 2), **vocabulary)
    except ValueError as error:
        raise RunError(f"--teacher {config.teacher}: half of its layers are no model ({error}).") from None


def describe_tokenizer(tokenizer: Tokenizer, family: Family, model: EncoderConfig) -> str:
    """Describe the tokenizer and, if the family's own is of another kind, the model's inputs that it makes."""
    found = f"tokenizer: {TITLES[tokenizer.kind]}, {tokenizer.vocab_size:,} tokens"
    if tokenizer.kind in family.tokenizers:
        return found
    parts = tokenizer.template
    before, between, after = (
        "".join(tokenizer.tokens[number] for number in part) for part in (parts.before, parts.between, parts.after)
    )
    own = " or ".join(TITLES[kind] for kind in family.tokenizers)
    types = f", B of token type {parts.second_type}" if getattr(model, "token_types", 0) > 1 else ""
    return f"{found} ({family.title}'s own is {own}): inputs are {before} A {between} B {after}{types}"


def make_model(
    config: PretrainConfig, architecture: EncoderConfig, head: str, memory: Callable[[Any], Any] = lambda _: {}
) -> tuple[Any, Learner]:
    """Return the model and its learner; nothing is computed yet. For `memory` see `Objective.memory`."""
    model = family_of(architecture).build(head, architecture)
    rate = schedule(config.optim, [(phase.steps, phase.learning_rate) for phase in config.plan])
    made = make_learner(
        partial(init_params, model),
        optim=config.optim,
        rate=rate,
        seed=config.seed,
        trains=lambda names: "final_logits_bias" not in names,  # BART's, which is only loaded and saved
        memory=partial(memory, model),
    )
    return model, made


def initial_weights(config: PretrainConfig, head: str) -> InitialWeights | None:
    """Return the weights of --init-from; parameters of a head that the checkpoint lacks are newly initialised."""
    folder = config.init_from
    if folder is None:
        return None
    return InitialWeights(lambda: load(folder, head=head, seed=config.seed).params, f"the weights of {folder}")


# --- weights made of other models' ------------------------------------------------------------------------------------

TABLES = (("word", "embedding"), ("position", "embedding"), ("mlm", "bias"))
"""Ends of the paths of parameters that have a row for each word or position."""


def evenly_spaced(layers: int, count: int) -> tuple[int, ...]:
    """Return `count` of the numbers of `layers` layers, evenly spaced from the first to the last.

    For 6 of 12 these are the original's 0, 2, 4, 7, 9, 11 (its extract_distilbert.py).
    """
    return tuple(round(number * (layers - 1) / max(1, count - 1)) for number in range(count))


def student_params(teacher: Teacher, model: Any) -> tuple[Params, tuple[int, ...]] | str:
    """Take a student's parameters from its teacher's.

    Tables of words and positions may have fewer rows than the teacher's. A teacher may have parts that the student's
    family lacks: token types, and a pooler.

    Args:
        teacher: the teacher.
        model: the student, with the same head.

    Returns:
        (the parameters on the host, the numbers of the teacher's layers), or why they do not fit, in words
    """
    theirs, ours = teacher.config, model.config
    family = family_of(ours)
    if family_of(theirs).name not in (family.name, *family.like):
        return f"a {family.title} cannot start from the layers of a {family_of(theirs).title}"
    if ours.layers > theirs.layers:
        return f"the teacher has {theirs.layers} layers, and the student {ours.layers}"
    layers = evenly_spaced(theirs.layers, ours.layers)
    sets = np.array(_sets(theirs))[list(layers)]
    own = _sets(ours)
    chosen = [sets[own.index(number)] for number in range(max(own) + 1)]
    held = dict(flatten(teacher.params))
    shapes = nn.unbox(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))
    problems = []

    def take(path: tuple[Any, ...], wanted: Any) -> Any:
        names = tuple(part.key for part in path)
        if names not in held:
            problems.append(f"{'.'.join(names)} is not there")
            return wanted
        found = np.asarray(held[names])
        if "layers" in names:
            found = found[chosen]
        elif names[-2:] in TABLES:
            found = found[: wanted.shape[0]]
        if found.shape != wanted.shape:
            problems.append(f"{'.'.join(names)} is {list(found.shape)} there, {list(wanted.shape)} in the student")
        return found

    params = jax.tree_util.tree_map_with_path(take, shapes)
    return f"the teacher's sizes are others: {problems[0]}" if problems else (params, layers)


def _sets(config: EncoderConfig) -> tuple[int, ...]:
    """Return the number of the set of parameters that each layer uses."""
    return tuple(range(config.layers)) if config.sets is None else tuple(config.sets)


class Folders(NamedTuple):
    """Checkpoint folders of ELECTRA's two networks, as far as they are given."""

    discriminator: Path | None = None
    generator: Path | None = None


def fitted_generator(architecture: ElectraConfig, folders: Folders) -> ElectraConfig:
    """Return the configuration of both networks, with a generator of the size that its folder says.

    Raises:
        RunError: the discriminator's folder is a generator's, or the two networks do not belong together.
    """
    folder, generator = folders
    if folder is not None and "ElectraForMaskedLM" in (read_config(folder).get("architectures") or []):
        raise RunError(
            f"--init-from {folder}: a generator (ElectraForMaskedLM). Give the discriminator's folder, and this one by "
            "--generator; or --objective mlm to go on with the generator alone."
        )
    if generator is None:
        return architecture
    loaded, report = load_with_report(generator, head="masked_lm")
    found: Any = loaded.config
    if not isinstance(found, ElectraConfig) or report.initialised:
        held = ", ".join(read_config(generator).get("architectures") or ["no architecture"])
        raise RunError(f"--generator {generator}: expected a generator (ElectraForMaskedLM), found {held}.")
    if found.width > architecture.width:
        raise RunError(f"--generator {generator}: it is {found.width} wide, and {folder} only {architecture.width}.")
    fitted = dataclasses.replace(architecture, generator_fraction=found.width / architecture.width)
    for name in ("layers", "heads", "feed_forward", "embedding_size", "vocab_size", "positions", "token_types"):
        own, wanted = getattr(found, name), getattr(fitted.generator, name)
        if own != wanted:
            raise RunError(f"--generator {generator}: its {name} is {own}, and {wanted} goes with {folder}.")
    return fitted


def pair_weights(folders: Folders, seed: int) -> InitialWeights | None:
    """Return the weights of both networks, the embeddings being the discriminator's; None unless both are given."""
    discriminator, generator = folders
    if discriminator is None or generator is None:
        return None

    def read() -> Params:
        first = load(discriminator, head="discriminator", seed=seed).params
        return together(first, load(generator, head="masked_lm", seed=seed).params)

    return InitialWeights(read, f"the weights of {discriminator} and of the generator {generator}")
