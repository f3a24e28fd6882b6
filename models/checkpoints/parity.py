"""Compare models with the reference implementation's numbers, for `bestiary parity FOLDER...`.

A fixture folder is a checkpoint with two more files, `expected.safetensors` (`input.*`, `output.*`, and `loss` if the
model defines one) and `grads.safetensors` (gradients of the loss, under the checkpoint's own names), written by the
reference implementation in float32 without dropout.

The errors are the largest absolute error of each output and of the loss, and for each gradient tensor the norm of the
difference relative to the norm of the reference. Some gradients are zero in exact arithmetic (softmax ignores a key
bias, which adds the same to all scores), so that the reference is rounding noise: a tensor whose norm is below `NOISE`
of the largest tensor's is measured relative to the largest. Outputs are compared at padded positions too; there the
reference lets padding attend to the tokens, which `layers.reference_segments` imitates.

A fixture of a model with a memory has consecutive segments of texts, `input.segment.0`, `input.segment.1`, ... and a
loss of each, `loss.0`, ...; the gradients are those of the last one's.

A fixture with a `trajectory.json` is trained on its batch as the reference was, see trajectory.py. One with a
`generate.json`, the settings of the reference's `generate`, generates from its inputs as `generate.sequences` and
`generate.scores` say. Finally, the checkpoint is saved again: the names and bytes must be the same.
"""

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ..attention_maps import attention_maps
from ..encoder import Encoded
from ..heads import losses
from ..heads.with_head import encoder_inputs
from ..layers.segments import Segments, reference_segments
from ..registry import family_of_model
from .folder import Loaded, Tensors, load, save
from .tables import CheckpointError, Params
from .trajectory import MakeOptimiser, trajectory_errors

NOISE = 1e-5
OUTPUT_TOLERANCE = 1e-5  # largest absolute error of any output, and of the loss
GRADIENT_TOLERANCE = 1e-4  # largest error of any gradient tensor, relative to the reference's norm
TRAJECTORY_TOLERANCE = 1e-4  # largest error of the loss of any step of a trajectory, relative to the reference's

Generate = Callable[[Any, Params, Path, list[list[int]]], list[tuple[list[int], float]]]
"""From a model, its parameters, a generate.json and token ids, to each output's tokens and score."""
Inputs = dict[str, Array]
Outputs = dict[str, Array]


@dataclass
class Report:
    """Result of comparing one fixture folder."""

    folder: str
    passed: bool = False
    error: str | None = None  # why nothing could be compared
    model: str | None = None
    outputs: dict[str, float] = field(default_factory=dict)  # largest absolute error of each
    loss: float | None = None  # absolute error
    gradient: float | None = None  # largest relative error
    gradient_tensor: str | None = None  # where
    gradients: dict[str, float] = field(default_factory=dict)  # relative error of each
    trajectory: float | None = None  # largest relative error of the loss of any training step
    trajectory_step: int | None = None  # which, from 1
    generated_differently: int | None = None  # number of inputs with other generated tokens
    scores: float | None = None  # largest absolute error of the scores of what is generated
    saved_differently: list[str] | None = None  # tensors that were not saved as they were read


def check(
    folder: Path,
    output_tolerance: float = OUTPUT_TOLERANCE,
    gradient_tolerance: float = GRADIENT_TOLERANCE,
    trajectory_tolerance: float = TRAJECTORY_TOLERANCE,
    make_optimiser: MakeOptimiser | None = None,
    generate: Generate | None = None,
) -> Report:
    """Compare one fixture folder; an exception that stops it is stored in the report's `error`.

    Args:
        folder: the fixture folder.
        output_tolerance: largest absolute error of any output, and of the loss.
        gradient_tolerance: largest error of any gradient tensor, relative to the reference's norm.
        trajectory_tolerance: largest error of the loss of any step of a trajectory, relative to the reference's.
        make_optimiser: makes the optimiser of a trajectory; None: trajectories are not run.
        generate: generates with the reference's settings; None: nothing is generated.
    """
    report = Report(str(folder))
    try:
        run(folder, report, make_optimiser, generate)
    except (OSError, ValueError, TypeError, NotImplementedError, SafetensorError) as error:
        report.error = str(error)
        return report
    within = [error <= output_tolerance for error in report.outputs.values()]
    if report.loss is not None:
        within.append(report.loss <= output_tolerance)
    if report.gradient is not None:
        within.append(report.gradient <= gradient_tolerance)
    if report.trajectory is not None:
        within.append(report.trajectory <= trajectory_tolerance)
    if report.scores is not None:
        within.append(report.scores <= output_tolerance)
    report.passed = all(within) and not report.generated_differently and not report.saved_differently
    return report


def run(
    folder: Path, report: Report, make_optimiser: MakeOptimiser | None = None, generate: Generate | None = None
) -> None:
    """Fill a report with the results of a fixture folder."""
    expected = _last_loss(_tensors(folder / "expected.safetensors"))
    loaded = load(folder)
    architecture = family_of_model(loaded.model)[1]
    report.model = architecture.name
    if architecture.head not in ADAPTERS:
        raise CheckpointError(
            f"{folder}: no parity of the head {architecture.head}; expected one of {', '.join(ADAPTERS)}"
        )
    adapter = ADAPTERS[architecture.head]
    inputs: Inputs = {
        name.removeprefix("input."): jnp.asarray(value.astype(np.int32) if value.dtype == np.int64 else value)
        for name, value in expected.items()
        if name.startswith("input.")
    }
    if "pixel_values" in inputs:  # the reference has channels first
        inputs["pixel_values"] = jnp.moveaxis(inputs["pixel_values"], 1, -1)
    types = inputs.get("token_type_ids")
    if types is not None and loaded.config.token_types < 2 and types.any():
        raise CheckpointError(f"{folder}: token_type_ids, but the model has only one token type")
    with jax.default_matmul_precision("highest"):
        outputs, gradient = _evaluate(adapter, loaded.model, "loss" in expected, loaded.params, inputs)
    for name, value in expected.items():
        if name.startswith("output."):
            report.outputs[name.removeprefix("output.")] = _difference(name, outputs, value)
    if "loss" in expected:
        report.loss = _difference("output.loss", outputs, expected["loss"].reshape(()))
        table = architecture.table(loaded.config)
        found = dict(table.save(jax.tree.map(np.asarray, gradient)))
        stored = _tensors(folder / "grads.safetensors")
        # The reference may name a parameter by its tied copy, or otherwise than its checkpoints do.
        names = {theirs: name for name, theirs in table.place(stored).sources.items()}
        report.gradients = gradient_errors(found, {names.get(name, name): g for name, g in stored.items()})
        report.gradient_tensor, report.gradient = max(report.gradients.items(), key=_nan_first)
    path = folder / "trajectory.json"
    if make_optimiser is not None and gradient is not None and path.is_file():
        with jax.default_matmul_precision("highest"):
            errors = trajectory_errors(
                path,
                lambda params: adapter(loaded.model, params, dict(inputs))["loss"],
                loaded.params,
                gradient,
                make_optimiser,
            )
        report.trajectory_step = int(errors.argmax()) + 1  # of NaN, if there is one
        report.trajectory = float(errors[report.trajectory_step - 1])
    path = folder / "generate.json"
    if generate is not None and path.is_file():
        _compare_generated(report, loaded, expected, partial(generate, loaded.model, loaded.params, path))
    report.saved_differently = saved_differently(folder, loaded)


def _compare_generated(
    report: Report,
    loaded: Loaded,
    expected: Mapping[str, np.ndarray],
    generate: Callable[[list[list[int]]], list[tuple[list[int], float]]],
) -> None:
    """Compare what is generated from the inputs with the reference's sequences and scores."""
    ids = expected["input.input_ids"]
    mask = expected.get("input.attention_mask", np.ones_like(ids))
    sources = [row[own != 0].tolist() for row, own in zip(ids, mask, strict=True)]
    c = loaded.config
    start = getattr(c, "decoder_start_token_id", None)
    ends = {c.eos_token_id, c.pad_token_id, None}  # what may follow an output
    generated = generate(sources)
    report.generated_differently = 0
    for source, (tokens, _), reference in zip(sources, generated, expected["generate.sequences"].tolist(), strict=True):
        whole = [*(source if start is None else [start]), *tokens]
        same = reference[: len(whole)] == whole and set(reference[len(whole) :]) <= ends
        report.generated_differently += not same
    if "generate.scores" in expected:
        scores = np.array([score for _, score in generated], np.float32)
        report.scores = float(np.abs(scores - expected["generate.scores"]).max())


@partial(jax.jit, static_argnums=(0, 1, 2))
def _evaluate(
    adapter: "Adapter", model: Any, with_loss: bool, params: Params, inputs: Inputs
) -> tuple[Outputs, Params | None]:
    """Compute the outputs, and the gradients of the loss if there is one."""

    def loss(params: Params) -> tuple[Array, Outputs]:
        outputs = adapter(model, params, dict(inputs))
        if "loss" not in outputs:
            raise CheckpointError(f"expected.safetensors: a loss, but no labels among {', '.join(inputs)}")
        return outputs["loss"], outputs

    if not with_loss:
        return adapter(model, params, dict(inputs)), None
    gradient, outputs = jax.grad(loss, has_aux=True)(params)
    return outputs, gradient


def gradient_errors(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the relative error of each gradient tensor; a tensor that the reference omits must be zero here."""
    unknown = sorted(set(expected) - set(found))
    if unknown:
        raise CheckpointError(f"grads.safetensors: no parameters {', '.join(unknown)}")
    largest = max(float(np.linalg.norm(value)) for value in expected.values())
    errors = {}
    for name, value in found.items():
        reference = expected.get(name, np.zeros_like(value))
        norm = float(np.linalg.norm(reference))
        errors[name] = float(np.linalg.norm(value - reference)) / (norm if norm > NOISE * largest else largest)
    return errors


def saved_differently(folder: Path, loaded: Loaded) -> list[str]:
    """Return the names of tensors that differ or are missing after loading and saving a checkpoint."""
    with tempfile.TemporaryDirectory() as temporary, Tensors(folder) as before:
        save(Path(temporary) / "model", loaded.model, loaded.params)
        with Tensors(Path(temporary) / "model") as after:
            return sorted(
                name
                for name in {*before.shapes, *after.shapes}
                if before.shapes.get(name) != after.shapes.get(name)
                or before.read(name).tobytes() != after.read(name).tobytes()
            )


def _nan_first(item: tuple[str, float]) -> float:
    return math.inf if math.isnan(item[1]) else item[1]


def _tensors(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a fixture holds config.json, model.safetensors and this")
    return load_file(path)


def _last_loss(expected: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a fixture's arrays with the loss of its last segment as its loss, and the others' as outputs."""
    losses = sorted((name for name in expected if name.startswith("loss.")), key=lambda name: int(name[5:]))
    names = {name: f"output.{name}" for name in losses[:-1]} | dict.fromkeys(losses[-1:], "loss")
    arrays = {names.get(name, name): value for name, value in expected.items()}
    return {name: value.reshape(()) if name.startswith("output.loss.") else value for name, value in arrays.items()}


def _difference(name: str, outputs: Outputs, expected: np.ndarray) -> float:
    name = name.removeprefix("output.")
    if name not in outputs:
        raise CheckpointError(f"expected.safetensors: no output {name} of this model; known: {', '.join(outputs)}")
    found = np.asarray(outputs[name], np.float32)
    if found.shape != expected.shape:
        raise CheckpointError(f"{name}: expected shape {list(expected.shape)}, found {list(found.shape)}")
    return float(np.abs(found - expected).max())


# Names of the reference's inputs, outputs and losses, by head.


def _call(model: Any, params: Params, inputs: Inputs, **arguments: Any) -> Any:
    """Run an encoder, with a head or without, removing the inputs that all of them share from `inputs`."""
    names = ("pixel_values", "input_ids", "position_ids", "token_type_ids")
    batch: dict[str, Any] = {name: inputs.pop(name) for name in names if name in inputs}
    batch["segment_ids"] = _segments(inputs)
    return model.apply({"params": params}, *encoder_inputs(model.config, batch), **arguments)


def _segments(inputs: Inputs) -> Segments:
    mask = inputs.pop("attention_mask", None)
    return None if mask is None else reference_segments(mask)


def _finish(inputs: Inputs, outputs: Outputs, loss: Array | None) -> Outputs:
    if inputs:
        raise NotImplementedError(f"inputs that parity does not know: {', '.join(inputs)}")
    return outputs if loss is None else {**outputs, "loss": loss}


def _mean(sums: Mapping[str, losses.WeightedSum]) -> Array:
    return sums["loss"].total / sums["loss"].weight


def _encoder(model: Any, params: Params, inputs: Inputs) -> Outputs:
    given = dict(inputs)
    encoded: Encoded = _call(model, params, inputs, every_layer=True)
    assert encoded.every_hidden is not None
    outputs = {"last_hidden_state": encoded.hidden}
    if encoded.pooled is not None:
        outputs["pooler_output"] = encoded.pooled
    outputs |= {f"hidden_states.{i}": hidden for i, hidden in enumerate(encoded.every_hidden)}
    weights = attention_maps(model, params, {**given, "segment_ids": _segments(dict(given))})
    outputs |= {f"attentions.{i}": of_layer for i, of_layer in enumerate(weights)}
    return _finish(inputs, outputs, None)


# Field of a pretraining model's output -> (the reference's output, its label).
PAIR_TASKS = {
    "nsp_logits": ("seq_relationship_logits", "next_sentence_label"),
    "sop_logits": ("sop_logits", "sentence_order_label"),
}


def _pretraining(model: Any, params: Params, inputs: Inputs) -> Outputs:
    logits: Any = _call(model, params, inputs)
    name, label = next((names for field, names in PAIR_TASKS.items() if hasattr(logits, field)), (None, None))
    if name is None or label is None:
        raise CheckpointError(f"{type(model).__name__}: the reference implementation has no such model")
    pair_logits = logits[1]
    labels, pair_labels = inputs.pop("labels", None), inputs.pop(label, None)
    loss = None
    if labels is not None and pair_labels is not None:
        loss = _mean(losses.class_losses(logits.mlm_logits, labels))
        loss += _mean(losses.class_losses(pair_logits, pair_labels))
    return _finish(inputs, {"prediction_logits": logits.mlm_logits, name: pair_logits}, loss)


def _classes(model: Any, params: Params, inputs: Inputs) -> Outputs:
    """Compute the outputs for masked words and tokens: logits and cross-entropy of every position."""
    logits = _call(model, params, inputs)
    labels = inputs.pop("labels", None)
    return _finish(inputs, {"logits": logits}, None if labels is None else _mean(losses.class_losses(logits, labels)))


def _next_tokens(model: Any, params: Params, inputs: Inputs) -> Outputs:
    """Compute the outputs of a language model; its labels are the inputs, which predict the token before them."""
    if "segment.0" in inputs:
        return _segments_with_memory(model, params, inputs)
    logits = _call(model, params, inputs)
    labels = inputs.pop("labels", None)
    loss = None if labels is None else _mean(losses.class_losses(logits[:, :-1], labels[:, 1:]))
    return _finish(inputs, {"logits": logits}, loss)


def _segments_with_memory(model: Any, params: Params, inputs: Inputs) -> Outputs:
    """Compute the outputs for consecutive segments. The reference begins with a memory of zeros, which is attended to.

    Its losses are in an order of its own: those of the words of each cluster together.
    """
    variables, outputs, count = {"params": params}, {}, len(inputs)
    memory = model.empty_memory(len(inputs["segment.0"]))
    memory = memory._replace(segment_ids=jnp.ones_like(memory.segment_ids))
    for number in range(count):
        ids = inputs.pop(f"segment.{number}")
        states, memory = model.apply(variables, ids, memory, method="read")
        outputs[f"log_probs.{number}"] = model.apply(variables, states, method="log_probabilities")
        losses = model.apply(variables, states[:, :-1], ids[:, 1:], method="token_losses")
        cluster = (ids[:, 1:, None] >= jnp.array(model.config.cutoffs, jnp.int32)[None, None]).sum(axis=-1).reshape(-1)
        outputs[f"losses.{number}"] = losses.reshape(-1)[jnp.argsort(cluster, stable=True)].reshape(losses.shape)
        outputs[f"loss.{number}"] = losses.mean()
    outputs |= {f"mems.{i}": jnp.swapaxes(hidden, 0, 1) for i, hidden in enumerate(memory.hidden)}
    return _finish(inputs, outputs, outputs[f"loss.{count - 1}"])


def _classification(model: Any, params: Params, inputs: Inputs) -> Outputs:
    logits = _call(model, params, inputs)
    labels = inputs.pop("labels", None)
    loss = None if labels is None else _mean(losses.sequence_losses(model.config.problem_type, logits, labels))
    return _finish(inputs, {"logits": logits}, loss)


def _discriminator(model: Any, params: Params, inputs: Inputs) -> Outputs:
    """Compute the outputs of a discriminator; its loss is over all tokens but padding."""
    mask = inputs.get("attention_mask")
    logits = _call(model, params, inputs)
    labels = inputs.pop("labels", None)
    loss = None
    if labels is not None:
        loss = _mean(losses.sequence_losses("multi_label_classification", logits[..., None], labels, mask))
    return _finish(inputs, {"logits": logits}, loss)


def _span(model: Any, params: Params, inputs: Inputs) -> Outputs:
    start_logits, end_logits = _call(model, params, inputs)
    starts, ends = inputs.pop("start_positions", None), inputs.pop("end_positions", None)
    loss = None
    if starts is not None and ends is not None:
        start, end = losses.span_sums(start_logits, end_logits, starts[:, None], ends[:, None])
        loss = (start.loss / start.weight + end.loss / end.weight) / 2
    return _finish(inputs, {"start_logits": start_logits, "end_logits": end_logits}, loss)


def _choice(model: Any, params: Params, inputs: Inputs) -> Outputs:
    labels = inputs.pop("labels", None)
    batch, choices, _ = inputs["input_ids"].shape
    flat = {name: value.reshape(batch * choices, -1) for name, value in inputs.items()}
    logits = _call(model, params, flat).reshape(batch, choices)
    loss = None if labels is None else _mean(losses.class_losses(logits, labels))
    return _finish(flat, {"logits": logits}, loss)


def _generation(model: Any, params: Params, inputs: Inputs) -> Outputs:
    """Compute the outputs of an encoder-decoder; the default decoder input is the labels, shifted by one."""
    c = model.config
    labels = inputs.pop("labels", None)
    decoder_ids = inputs.pop("decoder_input_ids", None)
    if decoder_ids is None:
        if labels is None:
            raise CheckpointError("expected.safetensors: neither labels nor decoder_input_ids")
        start = jnp.full((labels.shape[0], 1), c.decoder_start_token_id, labels.dtype)
        decoder_ids = jnp.concatenate([start, jnp.where(labels < 0, c.pad_token_id, labels)[:, :-1]], axis=1)
    segments = _segments(inputs)
    decoder_mask = inputs.pop("decoder_attention_mask", None)
    decoder_segments = None if decoder_mask is None else reference_segments(decoder_mask)
    logits = model.apply({"params": params}, inputs.pop("input_ids"), segments, None, decoder_ids, decoder_segments)
    loss = None if labels is None else _mean(losses.class_losses(logits, labels))
    return _finish(inputs, {"logits": logits}, loss)


Adapter = Callable[[Any, Params, Inputs], Outputs]
ADAPTERS: dict[str, Adapter] = {
    "encoder": _encoder,
    "pretraining": _pretraining,
    "discriminator": _discriminator,
    "masked_lm": _classes,
    "causal_lm": _next_tokens,
    "tokens": _classes,
    "classification": _classification,
    "span": _span,
    "choice": _choice,
    "generation": _generation,
}
