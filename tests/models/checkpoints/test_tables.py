"""Tables of stored names: every way of storing a parameter, read and written, and what does not fit named."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from bestiary.models.checkpoints.tables import (
    CheckpointError,
    Entry,
    Table,
    Transposed,
    Untransposed,
    flatten,
    fused_entries,
    linear_entries,
    norm_entries,
    same,
)

WIDTH, HEADS, LAYERS = (6,), (2, 3), 4
PARTS = ("query", "key", "value")

# Released forms: a fused map [in, 3·out] (GPT-2) and [3·out, in] (ModernBERT, Transformer-XL), a first layer without a
# norm (ModernBERT), a bias of block 0 alone (T5), stacks of every other layer, one set of tensors for all (ALBERT).
KINDS: dict[str, Sequence[Entry]] = {
    "linear": linear_entries("h.{layer}.fc", ("layers", "inner"), WIDTH, (5,), LAYERS),
    "conv1d": linear_entries("h.{layer}.fc", ("layers", "inner"), WIDTH, (5,), LAYERS, kernel=Untransposed),
    "fused": fused_entries(
        "h.{layer}.c_attn", [("layers", part) for part in PARTS], WIDTH, HEADS, LAYERS, kernel=Untransposed
    ),
    "fused, transposed": fused_entries("Wqkv", [(part,) for part in PARTS], WIDTH, HEADS, bias=False),
    "fused, of several sizes": [
        Entry("table", ("first",), same(4, 3), fused=0),
        Entry("table", ("second",), same(2, 3), fused=0),
    ],
    "hole": norm_entries("layers.{layer}.attn_norm", ("layers", "norm"), 6, LAYERS, bias=False, absent=(0,)),
    "one layer": [Entry("block.0.relative_attention_bias.weight", ("bias", "table"), same(8, 2))],
    "period": [
        *linear_entries("h.{layer}.fc", ("dense", "inner"), WIDTH, (5,), range(0, LAYERS, 2)),
        *linear_entries("h.{layer}.fc", ("banded", "inner"), WIDTH, (5,), range(1, LAYERS, 2)),
    ],
    "scalars": [Entry("mix.{layer}.gamma", ("mix",), same(), LAYERS)],
}


def draw_stored(table: Table) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.normal(size=table.stored_shape(name)).astype(np.float32) for name in table.names}


def load(table: Table, stored: dict[str, np.ndarray]) -> dict[str, Any]:
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    return table.load(table.place(stored), shapes, stored.__getitem__, "folder")


@pytest.mark.parametrize("kind", KINDS)
def test_read_and_written_again_gives_the_same_bytes(kind: str) -> None:
    table = Table(tuple(KINDS[kind]))
    stored = draw_stored(table)
    params = load(table, stored)
    assert {path: leaf.shape for path, leaf in flatten(params)} == {entry.path: entry.shape for entry in table.entries}
    written = dict(table.save(params))
    assert list(written) == table.names == list(dict.fromkeys(table.names))
    assert {name: (tensor.shape, tensor.tobytes()) for name, tensor in written.items()} == {
        name: (tensor.shape, tensor.tobytes()) for name, tensor in stored.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_missing_and_unmapped_names_are_both_told(kind: str) -> None:
    table = Table(tuple(KINDS[kind]))
    stored = draw_stored(table)
    left_out = table.names[-1]
    del stored[left_out]
    placed = table.place([*stored, "another.weight"])
    assert (placed.missing, placed.unmapped) == ([left_out], ["another.weight"])
    expected = {entry.path for entry in table.entries if left_out not in entry.names}
    assert {path for path, _ in flatten(load(table, stored))} == expected


def test_fused_maps_are_cut_in_the_stored_order() -> None:
    """What a fused map gives is what its parts give, one after the other."""
    inputs = np.random.default_rng(1).normal(size=(5, 6)).astype(np.float32)
    for kernel, product in ((Untransposed, lambda x, w: x @ w), (Transposed, lambda x, w: x @ w.T)):
        table = Table(tuple(fused_entries("qkv", [(part,) for part in PARTS], WIDTH, HEADS, kernel=kernel)))
        stored = draw_stored(table)
        assert stored["qkv.weight"].shape == ((6, 18) if kernel is Untransposed else (18, 6))
        params = load(table, stored)
        parts = [
            np.einsum("te,ehd->thd", inputs, params[part]["kernel"]).reshape(5, -1) + params[part]["bias"].reshape(-1)
            for part in PARTS
        ]
        expected = product(inputs, stored["qkv.weight"]) + stored["qkv.bias"]
        np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, atol=1e-5)


def test_a_layer_without_a_norm_has_a_gain_of_one() -> None:
    table = Table(tuple(KINDS["hole"]))
    stored = draw_stored(table)
    assert sorted(stored) == [f"layers.{layer}.attn_norm.weight" for layer in (1, 2, 3)]
    gains = load(table, stored)["layers"]["norm"]["scale"]
    np.testing.assert_array_equal(gains[0], 1)
    np.testing.assert_array_equal(gains[2], stored["layers.2.attn_norm.weight"])


def test_every_tensor_that_does_not_fit_is_told() -> None:
    table = Table((*KINDS["fused"], *KINDS["hole"]))
    stored = draw_stored(table)
    stored["h.1.c_attn.weight"] = stored["h.1.c_attn.weight"].T
    stored["layers.3.attn_norm.weight"] = np.zeros(7, np.float32)
    found = r"(?s)h\.1\.c_attn\.weight: expected shape \[6, 18\], found \[18, 6\].*layers\.3.* \[6\], found \[7\]"
    with pytest.raises(CheckpointError, match=found):
        load(table, stored)
    params = load(table, draw_stored(table))
    params["layers"]["extra"] = np.zeros(1)
    del params["layers"]["key"]
    params["layers"]["query"]["bias"] = np.zeros((3, 2, 3))
    with pytest.raises(CheckpointError) as told:
        dict(table.save(params))
    assert str(told.value).splitlines()[1:] == [
        "  layers/extra: no stored name",
        "  layers/query/bias: expected shape [4, 2, 3], found [3, 2, 3]",
        "  layers/key/kernel: missing",
        "  layers/key/bias: missing",
    ]


def test_two_entries_of_one_name_must_be_parts_of_it() -> None:
    with pytest.raises(ValueError, match="a: of two entries"):
        Table((Entry("a", ("x",), same(2)), Entry("a", ("y",), same(2)))).place([])


def test_buffers_are_dropped_tied_copies_and_constants_are_kept() -> None:
    position_ids = np.arange(3)[None]
    table = Table(
        (Entry("model.words", ("words",), same(3, 2)),),
        prefix="model.",
        tied={"head": "model.words"},
        buffers={"position_ids": position_ids},
        dropped={"model.mask"},
    )
    words = np.ones((3, 2), np.float32)
    stored: dict[str, np.ndarray] = {"words": words, "mask": np.zeros(9), "head": words, "position_ids": position_ids}
    placed = table.place(stored)
    assert (placed.unmapped, placed.missing, placed.repeated) == (
        [],
        [],
        {"head": "head", "position_ids": "position_ids"},
    )
    written = dict(table.save(load(table, stored), [("head", "float32"), ("position_ids", "int32")]))
    assert list(written) == ["model.words", "head", "position_ids"]
    assert written["position_ids"].dtype == np.int32
    np.testing.assert_array_equal(written["head"], words)
    stored["head"] = 2 * words
    with pytest.raises(CheckpointError, match="head: differs from words"):
        load(table, stored)
