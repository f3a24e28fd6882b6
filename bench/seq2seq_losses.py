"""Train a small T5 and a small BART here and in PyTorch on the same batches, and compare the losses.

uv run python bench/seq2seq_losses.py write FOLDER      models and batches of the shared books, and 100 losses here
peer/bin/python bench/seq2seq_losses.py peer FOLDER     the same in transformers; the largest relative difference
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

SHARED = Path(__file__).parents[2] / "shared"
STEPS, ROWS, LENGTH = 100, 4, 128
INPUTS = (
    "input_ids", "segment_ids", "position_ids", "decoder_input_ids", "decoder_segment_ids", "decoder_position_ids",
)  # fmt: skip


def text_ids(tokenizer: Any, count: int) -> np.ndarray:
    """Return the first ids of the books, int32."""
    books = sorted((SHARED / "data" / "books").glob("*.md"))[:3]
    text = "\n".join(book.read_text(encoding="utf-8") for book in books)[:700_000]
    return tokenizer.encode_literally([text])[0][:count].astype(np.int32)


def build(family: str) -> tuple[Any, Any, np.ndarray]:
    """Return a model, its objective, and rows [steps, rows, length] before the noise."""
    from bestiary.data import load_tokenizer
    from bestiary.models.registry import family_named
    from bestiary.train.pretrain.config import PretrainConfig
    from bestiary.train.pretrain.denoising.denoise import Denoising
    from bestiary.train.pretrain.denoising.span_corruption import SpanCorruption, raw_length

    of = family_named(family)
    folder = SHARED / "data" / "tokenizers" / {"t5": "t5-base", "bart": "roberta-base"}[family]
    tokenizer = load_tokenizer(folder)
    config: Any = of.config
    words = config.vocabulary_fields(tokenizer.vocab_size, tokenizer.special_ids)
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "width": 64, "dropout": 0.0}
    settings = PretrainConfig(
        tokenizer=folder, sequence_length=LENGTH, batch_tokens=ROWS * LENGTH, mask_rate=of.mask_rate
    )
    if family == "t5":
        model = of.build("generation", config(**sizes, **words, heads=2, head_size=32, feed_forward=128))
        length = raw_length(LENGTH, of.mask_rate)
        rows = text_ids(tokenizer, STEPS * ROWS * length).reshape(STEPS, ROWS, length)
        return model, SpanCorruption.create(settings, tokenizer), rows
    sides = {
        f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("heads", 2), ("feed_forward", 128))
    }
    model = of.build("generation", config(**sizes, **sides, **words, positions=LENGTH))
    rows = text_ids(tokenizer, STEPS * ROWS * (LENGTH - 2)).reshape(STEPS, ROWS, LENGTH - 2)
    ends = ((0, 0), (0, 0), (1, 1))
    rows = np.pad(rows, ends, constant_values=((0, 0), (0, 0), (tokenizer.cls_id, tokenizer.sep_id)))
    return model, Denoising.create(settings, tokenizer), rows


def write(family: str, folder: Path) -> None:
    """Train here; write the model before that, the batches and the losses."""
    import jax
    import optax
    from flax import linen as nn

    from bestiary import models
    from bestiary.models.registry import init_params
    from bestiary.train.config import OptimConfig
    from bestiary.train.optim.optimizer import optimizer
    from bestiary.train.optim.schedule import schedule
    from bestiary.train.sharding import logical_specs

    model, objective, rows = build(family)
    folder.mkdir(parents=True, exist_ok=True)
    batches: list[dict[str, np.ndarray]] = []
    corrupt = jax.jit(objective.corrupt)
    for number, ids in enumerate(rows):
        row_ids = np.stack([np.zeros(ROWS), np.arange(ROWS) + ROWS * number], 1).astype(np.uint32)
        raw = {"input_ids": ids, "segment_ids": np.ones(ids.shape, np.int32), "row_ids": row_ids}
        batches.append(jax.device_get(corrupt(jax.random.key(0), raw)))
    names = (*INPUTS, "labels", "label_weights")
    np.savez(folder / "batches.npz", **{name: np.stack([batch[name] for batch in batches]) for name in names})
    boxed = init_params(model, jax.random.key(1))
    models.save(folder / "model", model, jax.device_get(nn.unbox(boxed)))
    constants = {name: nn.unbox(boxed.pop(name)) for name in ("final_logits_bias",) if name in boxed}
    optim = OptimConfig(learning_rate=1e-3, warmup=0, schedule="constant", weight_decay=0.0, epsilon=1e-8)
    transform = optimizer(optim, schedule(optim, [(STEPS, None)]), logical_specs(boxed))

    def loss(params: Any, batch: Any) -> Any:
        variables = {"params": {**params, **constants}}
        states = model.apply(variables, *(batch[name] for name in INPUTS), method="output_states")
        sums = model.apply(variables, [states], batch["labels"], batch["label_weights"], method="loss")
        return sums.loss / sums.weight

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, state = transform.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    params, losses = nn.unbox(boxed), []
    state = transform.init(params)
    for batch in batches:
        params, state, value = step(params, state, {name: batch[name] for name in names})
        losses.append(float(value))
    (folder / "losses.json").write_text(json.dumps(losses))
    print(f"{family}: {losses[0]:.4f} to {losses[-1]:.4f}")


def peer(family: str, folder: Path) -> None:
    """Train in PyTorch, and print the largest difference."""
    import torch
    import transformers

    kind = {"t5": transformers.T5ForConditionalGeneration, "bart": transformers.BartForConditionalGeneration}[family]
    model, batches = kind.from_pretrained(folder / "model").eval(), np.load(folder / "batches.npz")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, eps=1e-8)
    found = []
    for number in range(len(batches["labels"])):
        batch = {name: torch.tensor(batches[name][number]).long() for name in batches}
        optimiser.zero_grad()
        loss = model(
            input_ids=batch["input_ids"],
            attention_mask=(batch["segment_ids"] > 0).long(),
            decoder_input_ids=batch["decoder_input_ids"],
            decoder_attention_mask=(batch["decoder_segment_ids"] > 0).long(),
            labels=torch.where(batch["label_weights"] > 0, batch["labels"], -100),
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        found.append(loss.item())
    ours = np.array(json.loads((folder / "losses.json").read_text()))
    errors = np.abs(ours - found) / np.array(found)
    print(f"{family}: largest relative difference {errors.max():.1e}, at step {errors.argmax() + 1}")


def main() -> None:
    """Do one half of the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["write", "peer"])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    for family in ("t5", "bart"):
        (write if arguments.what == "write" else peer)(family, arguments.folder / family)


if __name__ == "__main__":
    main()
