"""Bits per character of a Transformer-XL on a text, by the length of its memory at evaluation.

    python bench/memory.py --model runs/characters --text wiki.valid.tokens --memory 0 128 512

The text is read in columns, `--length` tokens at a time. Only what has the longest memory behind it counts, which are
the same tokens for every memory.
"""

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bestiary.data.reading import read_text
from bestiary.train.language_model.model import open_language_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="run folder, or checkpoint folder")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--memory", type=int, nargs="+", default=[0, 128, 512], help="slots")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200_000, help="of the text")
    options = parser.parse_args()
    language_model = open_language_model(options.model)
    model, params = language_model.model, language_model.params
    tokens, _ = language_model.tokenizer.encode_literally([read_text(options.text, "utf-8")])
    tokens = tokens[: options.tokens]
    column = (len(tokens) - 1) // options.columns // options.length * options.length
    places = np.arange(options.columns)[:, None] * column + np.arange(column + 1)
    text = tokens[places].reshape(options.columns, column + 1)
    skipped = -(-max(options.memory) // options.length)  # rows before the longest memory is full

    @partial(jax.jit, donate_argnums=1)
    def read(params: Any, memory: Any, ids: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        states, memory = model.apply({"params": params}, ids, memory, method="read")
        return model.apply({"params": params}, states, labels, method="token_losses").sum(), memory

    for slots in options.memory:
        memory, total, begun = model.empty_memory(options.columns, slots), 0.0, time.perf_counter()
        for row in range(column // options.length):
            part = text[:, row * options.length : (row + 1) * options.length + 1]
            losses, memory = read(params, memory, jnp.asarray(part[:, :-1]), jnp.asarray(part[:, 1:]))
            total += float(losses) if row >= skipped else 0.0
        counted = options.columns * (column - skipped * options.length)
        bits = total / counted / math.log(2)
        seconds = time.perf_counter() - begun
        print(json.dumps({"memory": slots, "bits_per_token": bits, "tokens": counted, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
