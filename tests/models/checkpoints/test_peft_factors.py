"""Adapters of several ranks and factors: loaded, run, merged and saved again, as peft computes them."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bestiary import models
from bestiary.models.checkpoints.peft import CONFIG, WEIGHTS, load_adapted, load_lora, save_lora
from bestiary.models.checkpoints.tables import CheckpointError
from bestiary.models.lora import adapted, merge_lora
from bestiary.train.cli import main

FIXTURES = Path(__file__).parents[1] / "fixtures"
BASE, ADAPTER = FIXTURES / "bert_classification", FIXTURES / "peft_lora"
PREFIX = "base_model.model."


def patterned(folder: Path, stabilised: bool) -> dict[str, float]:
    """Write an adapter with patterns; return the factor of each adapted module."""
    shutil.copytree(ADAPTER, folder)
    config = json.loads((folder / CONFIG).read_text())
    config |= {"use_rslora": stabilised, "rank_pattern": {"layer.1.attention.self.query": 5}}
    config |= {"alpha_pattern": {"output.dense": 2, "layer.[12].attention.self.query": 7}}
    (folder / CONFIG).write_text(json.dumps(config))
    tensors = load_file(folder / WEIGHTS)
    random = np.random.default_rng(0)
    factors = {}
    for name in [name for name in tensors if ".lora_A." in name]:
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        rank = 5 if module.endswith("layer.1.attention.self.query") else 3
        b = name.replace(".lora_A.", ".lora_B.")
        tensors[name] = random.normal(size=(rank, tensors[name].shape[1])).astype(np.float32)
        tensors[b] = random.normal(size=(tensors[b].shape[0], rank)).astype(np.float32)
        query = module.endswith(("layer.1.attention.self.query", "layer.2.attention.self.query"))
        alpha = 2 if module.endswith("output.dense") else 7 if query else 6
        factors[module] = alpha / (math.sqrt(rank) if stabilised else rank)
    save_file(tensors, folder / WEIGHTS)
    return factors


@pytest.mark.parametrize("stabilised", [False, True])
def test_each_adapter_has_its_own_factor(tmp_path: Path, stabilised: bool):
    factors = patterned(tmp_path / "adapter", stabilised)
    assert len(set(factors.values())) == 4
    loaded, params, config = load_adapted(BASE, tmp_path / "adapter")
    tensors, before = load_file(tmp_path / "adapter" / WEIGHTS), load_file(BASE / "model.safetensors")
    merged, _ = merge_lora(params, config)
    models.save(tmp_path / "merged", loaded.model, merged)
    after = load_file(tmp_path / "merged" / "model.safetensors")
    for module, factor in factors.items():
        a, b = (tensors[f"{PREFIX}{module}.lora_{half}.weight"].astype(np.float64) for half in "AB")
        expected = before[f"{module}.weight"] + factor * (b @ a)
        np.testing.assert_allclose(after[f"{module}.weight"], expected, rtol=1e-6, atol=1e-6)

    ids = jnp.asarray([[2, 11, 12, 13, 3]])
    with adapted(config):
        branched = jax.jit(loaded.model.apply)({"params": params}, ids)
    plain = models.load(tmp_path / "merged")
    np.testing.assert_allclose(branched, jax.jit(plain.model.apply)({"params": plain.params}, ids), atol=2e-4)

    save_lora(tmp_path / "again", loaded.model, params, config)
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert all(np.array_equal(again[name], tensor) for name, tensor in tensors.items())
    read, same = load_lora(tmp_path / "again", loaded.model, loaded.params)
    assert same == config
    stored = json.loads((tmp_path / "again" / CONFIG).read_text())
    assert stored["use_rslora"] is stabilised
    assert set(stored["alpha_pattern"].values()) == {2, 7}
    twice, _ = merge_lora(read, same)
    models.save(tmp_path / "twice", loaded.model, twice)
    found = load_file(tmp_path / "twice" / "model.safetensors")
    assert all(found[name].tobytes() == tensor.tobytes() for name, tensor in after.items())


def test_the_commands_merge_and_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["adapter", "load", str(BASE), str(ADAPTER)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["rank"], said["alpha"], said["scale"]) == (3, 6.0, 2.0)
    assert "encoder.layers.attention.query" in said["adapted"]
    assert main(["adapter", "merge", str(BASE), str(ADAPTER), "--out", str(tmp_path / "merged")]) == 0
    expected = load_file(ADAPTER / "expected.safetensors")
    plain = models.load(tmp_path / "merged")
    ids, mask = (jnp.asarray(expected[name], jnp.int32) for name in ("input_ids", "segment_ids"))
    logits = jax.jit(plain.model.apply)({"params": plain.params}, ids, mask)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)
    assert main(["adapter", "merge", str(BASE), str(ADAPTER), "--out", str(tmp_path / "merged")]) == 1
    assert "exists and is not empty" in capsys.readouterr().err


def test_the_head_comes_with_the_adapter_or_is_missing(tmp_path: Path):
    """On a checkpoint without a classifier, or with one of other classes, the adapter's own is taken."""
    for base in (FIXTURES / "bert_model", FIXTURES / "bert_regression"):
        loaded, params, _ = load_adapted(base, ADAPTER)
        assert loaded.config.num_labels == 3
        assert params["classifier"]["kernel"].shape == (16, 3)
    shutil.copytree(ADAPTER, tmp_path / "bare")
    tensors = {name: t for name, t in load_file(ADAPTER / WEIGHTS).items() if "classifier" not in name}
    save_file(tensors, tmp_path / "bare" / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"classifier\.weight: neither in the checkpoint nor in the adapter"):
        load_adapted(FIXTURES / "bert_model", tmp_path / "bare")


def test_a_stored_factor_gives_back_its_alpha(tmp_path: Path):
    """The factor is float32 in the tree, and the file says what peft's said."""
    patterned(tmp_path / "adapter", True)
    loaded, params, config = load_adapted(BASE, tmp_path / "adapter")
    save_lora(tmp_path / "again", loaded.model, params, config)
    stored: dict[str, Any] = json.loads((tmp_path / "again" / CONFIG).read_text())
    assert stored["alpha_pattern"]["bert.encoder.layer.1.attention.self.query"] == 7
