"""The model to pretrain: a released size, or the checkpoint that a run starts from."""

import dataclasses
from functools import partial
from typing import Any

from ...data import Tokenizer
from ...data.tokenizers.kinds import TITLES
from ...models import load
from ...models.checkpoints.folder import family_of_folder, read_config
from ...models.family import EncoderConfig, Family
from ...models.registry import family_of, init_params, presets
from ..arguments import did_you_mean
from ..errors import RunError
from ..learner import Learner, compute_dtype, make_learner
from ..loop import InitialWeights
from ..optim.schedule import schedule
from .config import PretrainConfig


def asked_family(config: PretrainConfig) -> Family:
    """Return the family of the requested model.

    Raises:
        RunError: there is no model of that name.
    """
    if config.init_from is not None:
        return family_of_folder(read_config(config.init_from), config.init_from)
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
    run: dict[str, Any] = dict(
        dtype=compute_dtype(config.dtype),
        scan_layers=config.scan_layers,
        remat=config.remat,
        **({} if config.generator_size is None else {"generator_fraction": config.generator_size}),
        attention_implementation=config.attention,
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
        sizes: Any = asked_family(config).config
        vocabulary = sizes.vocabulary_fields(tokenizer.vocab_size, tokenizer.special_ids)
        found = sizes.preset(config.model, **vocabulary)
    model = dataclasses.replace(found, **run, **found.dropout_fields(config.dropout))
    longest = max(phase.length for phase in config.plan)
    if model.max_length is not None and longest > model.max_length:
        raise RunError(f"The sequence length {longest} is beyond the model's {model.max_length} positions.")
    return model


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
    types = f", B of token type {parts.second_type}" if model.token_types > 1 else ""
    return f"{found} ({family.title}'s own is {own}): inputs are {before} A {between} B {after}{types}"


def make_model(config: PretrainConfig, architecture: EncoderConfig, head: str) -> tuple[Any, Learner]:
    """Return the model and its learner; nothing is computed yet."""
    model = family_of(architecture).build(head, architecture)
    rate = schedule(config.optim, [(phase.steps, phase.learning_rate) for phase in config.plan])
    return model, make_learner(partial(init_params, model), optim=config.optim, rate=rate, seed=config.seed)


def initial_weights(config: PretrainConfig, head: str) -> InitialWeights | None:
    """Return the weights of --init-from; parameters of a head that the checkpoint lacks are newly initialised."""
    folder = config.init_from
    if folder is None:
        return None
    return InitialWeights(lambda: load(folder, head=head, seed=config.seed).params, f"the weights of {folder}")
