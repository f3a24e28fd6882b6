"""Measure the comparison of layers in Vaswani et al. 2017, table 1.

    bestiary bench layers --lengths 128,256,512,1024,2048 --out bench/
    bestiary bench layers --runs runs/plain runs/attention runs/transformer --out bench/    # trained.py

For a sequence of n positions of width d, a convolution of kernel width k and a neighbourhood of r positions:

| layer                     | complexity     | sequential operations | longest path |
| ------------------------- | -------------- | --------------------- | ------------ |
| self-attention            | O(n^2 d)       | O(1)                  | O(1)         |
| recurrent                 | O(n d^2)       | O(n)                  | O(n)         |
| convolutional             | O(k n d^2)     | O(1)                  | O(log_k n)   |
| self-attention, restricted | O(r n d)      | O(1)                  | O(n / r)     |

Each layer is exactly what the table counts: attention without projections (heads of 64); a recurrent layer h' = tanh(W
x + U h); a convolution over the sequence with all d x d channels. The longest path of a convolution is that of a stack
of dilated ones. Times are of one layer, forward, and forward with all gradients; `timing.py` says how they are
measured.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from matplotlib.figure import Figure

from ..dispatch import attention
from ..tuning import chip
from . import trained
from .cases import BenchError
from .config import LayersBenchConfig
from .report import command, png
from .timing import METHOD, machine, table, time_jax, write, write_json

HEAD = 64

Layer = Callable[[Array, tuple[Array, ...]], Array]
"""A layer: a function from sequences [B, n, d] and the layer's weights to sequences of the same shape."""


@dataclass(frozen=True)
class Described:
    """One row of the table, for one length. Operations are multiply-adds."""

    name: str
    complexity: str
    operations: int
    sequential: int
    path: int


def describe(length: int, width: int, kernel: int, neighbourhood: int) -> list[Described]:
    """Evaluate table 1 for a sequence of `length` positions. Attention's operations are those of both its products."""
    near = sum(min(length - 1, i + neighbourhood // 2) - max(0, i - neighbourhood // 2) + 1 for i in range(length))
    return [
        Described("self-attention", "O(n^2 d)", 2 * length**2 * width, 1, 1),
        Described("recurrent", "O(n d^2)", 2 * length * width**2, length, length),
        Described(
            "convolutional", "O(k n d^2)", kernel * length * width**2, 1, max(1, math.ceil(math.log(length, kernel)))
        ),
        Described("restricted attention", "O(r n d)", 2 * near * width, 1, math.ceil(length / neighbourhood)),
    ]


def attend(rows: Array, weights: tuple[Array, ...], window: tuple[int, int] | None = None) -> Array:
    """Apply self-attention without weights: [B, n, d] -> [B, n, d]."""
    del weights
    heads = rows.reshape(*rows.shape[:2], -1, HEAD)
    return attention(heads, heads, heads, window=window).reshape(rows.shape)


def recur(rows: Array, weights: tuple[Array, ...]) -> Array:
    """Apply an Elman layer: the product with the inputs for all positions at once, with the state one by one."""
    inputs, state = weights
    driven = jnp.swapaxes(rows @ inputs, 0, 1)

    def step(hidden: Array, given: Array) -> tuple[Array, Array]:
        hidden = jnp.tanh(given + hidden @ state)
        return hidden, hidden

    return jnp.swapaxes(lax.scan(step, jnp.zeros_like(driven[0]), driven)[1], 0, 1)


def convolve(rows: Array, weights: tuple[Array, ...]) -> Array:
    """Apply a convolution over positions between all pairs of channels, zero-padded to keep the length."""
    return lax.conv_general_dilated(rows, weights[0], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


def layers(config: LayersBenchConfig, dtype: str) -> list[tuple[Layer, tuple[Array, ...]]]:
    """Return the layers in the order of `describe`, each with its weights."""
    keys = jax.random.split(jax.random.key(config.seed), 3)

    def draw(key: Array, *shape: int) -> Array:
        return (jax.random.normal(key, shape) / math.sqrt(math.prod(shape[:-1]))).astype(dtype)

    d, half = config.width, config.neighbourhood // 2
    return [
        (attend, ()),
        (recur, (draw(keys[0], d, d), draw(keys[1], d, d))),
        (convolve, (draw(keys[2], config.kernel, d, d),)),
        (lambda rows, weights: attend(rows, weights, (half, half)), ()),
    ]


def main(config: LayersBenchConfig) -> int:
    """Run `bestiary bench layers`; return the exit status."""
    try:
        if config.runs:
            return trained.compare(config)
        lengths = check(config)
    except BenchError as error:
        print(f"bestiary bench layers: {error}", file=sys.stderr)
        return 2
    config.out.mkdir(parents=True, exist_ok=True)
    result = run(config, lengths)
    stem = f"layers-{result['chip']}"
    text = markdown(result)
    write_json(config.out / f"{stem}.json", result)
    write(config.out / f"{stem}.md", text)
    write(config.out / f"{stem}.png", chart(result))
    print(text)
    print(f"Written: {config.out / stem}.json, .md, .png")
    return 0


def check(config: LayersBenchConfig) -> list[int]:
    """Return the lengths; raise a BenchError that names an invalid option."""
    parts = [part.strip() for part in config.lengths.split(",")]
    if not all(part.isdecimal() and int(part) > 1 for part in parts):
        raise BenchError(f"--lengths: expected integers above 1, separated by commas, found {config.lengths!r}")
    if config.width < HEAD or config.width % HEAD:
        raise BenchError(f"--width: expected a multiple of {HEAD}, found {config.width}")
    if config.kernel < 2:
        raise BenchError(f"--kernel: expected at least 2 positions, found {config.kernel}")
    if config.neighbourhood < 2:
        raise BenchError(f"--neighbourhood: expected at least 2 positions, found {config.neighbourhood}")
    if config.samples < 1:
        raise BenchError(f"--samples: expected at least 1, found {config.samples}")
    lengths = sorted({int(part) for part in parts})
    if lengths[-1] > config.tokens:
        raise BenchError(f"--tokens: expected at least the longest row, {lengths[-1]}, found {config.tokens}")
    return lengths


def run(config: LayersBenchConfig, lengths: Sequence[int]) -> dict[str, Any]:
    """Measure; return the contents of the JSON file."""
    name = chip() or "cpu"
    dtype = config.dtype if config.dtype != "auto" else "float32" if name == "cpu" else "bfloat16"
    timing = {"samples": config.samples, "least_seconds": config.sample_seconds}
    entries = []
    for length in lengths:
        count = config.tokens // length
        sets = [
            jax.random.normal(jax.random.fold_in(jax.random.key(config.seed), n), (count, length, config.width)).astype(
                dtype
            )
            for n in range(2)
        ]
        described = describe(length, config.width, config.kernel, config.neighbourhood)
        for known, (layer, weights) in zip(described, layers(config, dtype), strict=True):
            print(f"{length}: {known.name}", file=sys.stderr, flush=True)

            def both(rows: Array, weights: tuple[Array, ...], layer: Layer = layer) -> Any:
                out, pull = jax.vjp(layer, rows, weights)
                return out, pull(out)

            arguments = [(rows, weights) for rows in sets]
            entries.append(
                {
                    "length": length,
                    "rows": count,
                    **dataclasses.asdict(known),
                    "forward": time_jax(layer, arguments, **timing)._asdict(),
                    "forward_and_backward": time_jax(both, arguments, **timing)._asdict(),
                }
            )
    return {
        "bench": "layers",
        "date": datetime.now(UTC).date().isoformat(),
        "command": command(config, "layers"),
        "chip": name,
        **machine(),
        "method": METHOD,
        "dtype": dtype,
        "settings": {key: getattr(config, key) for key in ("tokens", "width", "kernel", "neighbourhood")},
        "entries": entries,
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the table, with an explanation, as Markdown."""
    settings = result["settings"]
    rows = [
        [
            str(entry["length"]),
            entry["name"],
            entry["complexity"],
            f"{entry['operations'] / 1e6:.4g}",
            str(entry["sequential"]),
            str(entry["path"]),
            f"{entry['forward']['median'] * 1e3:.3g}",
            f"{entry['forward_and_backward']['median'] * 1e3:.3g}",
        ]
        for entry in result["entries"]
    ]
    headers = ["n", "layer", "complexity", "Mop / row", "sequential", "longest path", "fwd ms", "fwd+bwd ms"]
    return "\n".join(
        [
            f"# Layers by length on {result['device']}, {result['dtype']}",
            "",
            f"{result['date']}, `{result['command']}`; jax {result['versions']['jax']}. The comparison of Vaswani et "
            f"al. 2017, table 1, measured: width d = {settings['width']}, convolution over k = {settings['kernel']}, "
            f"attention restricted to r = {settings['neighbourhood']} positions. Mop: millions of multiply-adds per "
            f"sequence; times are of a batch of {settings['tokens']} positions. {result['method']}",
            "",
            *(
                ["The reference backend computes all scores and masks them, so the restriction saves nothing here.", ""]
                if result["chip"] == "cpu"
                else []
            ),
            table(headers, rows),
            "",
        ]
    )


def chart(result: dict[str, Any]) -> bytes:
    """Return a PNG of time and of operations over length, on logarithmic axes."""
    names = list(dict.fromkeys(entry["name"] for entry in result["entries"]))
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    times, operations = figure.subplots(1, 2)
    tokens = result["settings"]["tokens"]
    for n, name in enumerate(names):
        entries = [entry for entry in result["entries"] if entry["name"] == name]
        lengths = [entry["length"] for entry in entries]
        for which, style in (("forward", "-"), ("forward_and_backward", "--")):
            label = name if which == "forward" else None
            times.plot(
                lengths, [e[which]["median"] * 1e3 for e in entries], style, color=f"C{n}", marker=".", label=label
            )
        operations.plot(
            lengths, [e["operations"] * e["rows"] / 1e9 for e in entries], color=f"C{n}", marker=".", label=name
        )
    for axes, label in (
        (times, f"ms per batch of {tokens} positions\n(dashed: with gradients)"),
        (operations, "10^9 operations per batch"),
    ):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("positions in a row, n")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    times.legend(fontsize=8, frameon=False)
    figure.suptitle(
        f"Layers by length on {result['device']}, {result['dtype']}, d = {result['settings']['width']}", fontsize=10
    )
    return png(figure)
