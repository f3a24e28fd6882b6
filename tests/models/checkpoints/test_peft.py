"""Adapters of maps that a checkpoint fuses and stores untransposed, as GPT-2's `c_attn` in Conv1D, in peft's files."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bestiary.models import lora
from bestiary.models.checkpoints import peft
from bestiary.models.checkpoints.tables import (
    Table,
    Untransposed,
    flatten,
    fused_entries,
    linear_entries,
)
from bestiary.models.lora import LoraConfig, add_lora, lora_targets, merge_lora

E, H, N = 8, (2, 4), 3
PARTS = [("layers", "attention", part) for part in ("query", "key", "value")]
TABLE = Table(
    (
        *fused_entries("h.{layer}.attn.c_attn", PARTS, (E,), H, N, kernel=Untransposed),
        *linear_entries("h.{layer}.attn.c_proj", ("layers", "attention", "out"), H, (E,), N, kernel=Untransposed),
    )
)
MODULE = "base_model.model.h.{}.attn.c_attn.lora_{}.weight"
MODEL = nn.Module()


@pytest.fixture(autouse=True)
def family(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family of this table, which is enough for adapters that no model is run with."""
    found = SimpleNamespace(checkpoint_table=lambda model: TABLE, is_encoder_parameter=lambda path: True)
    for module in (lora, peft):
        monkeypatch.setattr(module, "family_of_model", lambda model: (found, SimpleNamespace(head="causal")))


def drawn() -> dict[str, Any]:
    random = np.random.default_rng(0)
    stored = {name: random.normal(size=TABLE.stored_shape(name)).astype(np.float32) for name in TABLE.names}
    return TABLE.load(TABLE.place(stored), {n: t.shape for n, t in stored.items()}, stored.__getitem__, "")


def adapted(patterns: tuple[str, ...], config: LoraConfig) -> dict[str, Any]:
    """Parameters with adapters, as after training."""
    random = np.random.default_rng(1)
    params = add_lora(drawn(), lora_targets(MODEL, patterns), config, jax.random.key(0))

    def draw(path: Any, leaf: Any) -> Any:
        if path[-1].key != "lora_b":
            return np.asarray(leaf)
        return random.normal(size=leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, params)


@pytest.mark.parametrize(
    ("patterns", "parts"),
    [(("c_attn",), 3), (("query", "value"), 2), (("key",), 1), (("all-linear",), 3), (("output",), 0)],
)
def test_fused_adapters_are_written_as_one_and_come_apart_again(
    tmp_path: Path, patterns: tuple[str, ...], parts: int
) -> None:
    config = LoraConfig(rank=2, alpha=6.0)
    params = adapted(patterns, config)
    peft.save_lora(tmp_path, MODEL, params, config)
    tensors = load_file(tmp_path / peft.WEIGHTS)
    stored = json.loads((tmp_path / peft.CONFIG).read_text())
    assert stored["fan_in_fan_out"] is True
    # What peft adds to the Conv1D's weight [inputs, outputs] is what merging adds to the maps, side by side.
    merged = dict(TABLE.save(merge_lora(params, config)[0]))
    before = dict(TABLE.save(drawn()))
    if parts:
        assert tensors[MODULE.format(1, "A")].shape == (2 * parts, E)
        assert tensors[MODULE.format(1, "B")].shape == (3 * E, 2 * parts)
        assert stored["rank_pattern"] == ({f"h.{i}.attn.c_attn": 2 * parts for i in range(N)} if parts > 1 else {})
        delta = 3.0 * (tensors[MODULE.format(1, "B")] @ tensors[MODULE.format(1, "A")]).T
        name = "h.1.attn.c_attn.weight"
        np.testing.assert_allclose(merged[name] - before[name], delta, atol=1e-5)
    found, found_config = peft.load_lora(tmp_path, MODEL, drawn())
    assert found_config == config
    assert dict(flatten(found)).keys() == dict(flatten(params)).keys()
    jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.parametrize("trained", [True, False])
def test_a_fused_adapter_of_another_tool_is_read_by_each_map(tmp_path: Path, trained: bool) -> None:
    """One A for the three maps, and of another rank where its pattern says so."""
    random = np.random.default_rng(2)
    tensors = {}
    for layer in range(N):
        tensors[MODULE.format(layer, "A")] = random.normal(size=(4, E)).astype(np.float32)
        tensors[MODULE.format(layer, "B")] = random.normal(size=(3 * E, 4)).astype(np.float32) * trained
    save_file(tensors, tmp_path / peft.WEIGHTS)
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"c_attn": 4},
        "alpha_pattern": {"c_attn": 8},
    }
    (tmp_path / peft.CONFIG).write_text(json.dumps(config | {"fan_in_fan_out": True}))
    params, read = peft.load_lora(tmp_path, MODEL, drawn())
    assert params["layers"]["attention"]["key"]["lora_a"].shape == (N, E, 4)
    merged, before = dict(TABLE.save(merge_lora(params, read)[0])), dict(TABLE.save(drawn()))
    for layer in range(N):
        name = f"h.{layer}.attn.c_attn.weight"
        delta = 2.0 * (tensors[MODULE.format(layer, "B")] @ tensors[MODULE.format(layer, "A")]).T
        np.testing.assert_allclose(merged[name] - before[name], delta, atol=1e-5)
    (tmp_path / peft.CONFIG).write_text(json.dumps(config | {"alpha_pattern": {}}))
    params, read = peft.load_lora(tmp_path, MODEL, drawn())
    np.testing.assert_array_equal(params["layers"]["attention"]["key"]["lora_scale"], np.ones(N))
    halved = dict(TABLE.save(merge_lora(params, read)[0]))
    for layer in range(N):
        name = f"h.{layer}.attn.c_attn.weight"
        np.testing.assert_allclose(halved[name] - before[name], (merged[name] - before[name]) / 2, atol=1e-6)
