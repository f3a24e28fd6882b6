"""Checkpoints that contradict themselves: refused with the tensor or setting that is wrong, before memory is taken."""

import json
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bestiary import models
from bestiary.data import DataError
from bestiary.models.checkpoints.config import ConfigError, distinct_names
from bestiary.models.checkpoints.tables import CheckpointError

SPAN = Path(__file__).parents[1] / "fixtures" / "bert_span"
WEIGHT = "bert.encoder.layer.0.output.dense.weight"


@pytest.fixture
def changed(tmp_path: Path) -> Any:
    """Copy a small checkpoint, with settings of its config.json and tensors replaced."""

    def change(config: dict[str, Any] | None = None, tensors: dict[str, np.ndarray] | None = None) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(SPAN, folder, dirs_exist_ok=True)
        stored = json.loads((SPAN / "config.json").read_text()) | (config or {})
        (folder / "config.json").write_text(json.dumps(stored))
        save_file(load_file(SPAN / "model.safetensors") | (tensors or {}), folder / "model.safetensors")
        return folder

    return change


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"num_attention_heads": 0},
            "heads (num_attention_heads in config.json): expected a number at least 1",
        ),
        ({"num_attention_heads": -4}, "expected a number at least 1, found -4"),
        ({"num_attention_heads": 3}, "width 16 is not a multiple of heads 3"),
        ({"hidden_size": 0}, "width (hidden_size in config.json)"),
        ({"num_hidden_layers": 0}, "expected a number from 1 to 10,000, found 0"),
        ({"num_hidden_layers": 30_000_000}, "expected a number from 1 to 10,000, found 30000000"),
        ({"max_position_embeddings": 500_000_000}, "expected a number from 1 to 1,048,576"),
        ({"num_labels": 10**9, "id2label": None}, "num_labels: expected a number"),
        (
            {"layer_norm_eps": -1},
            "norm_epsilon (layer_norm_eps in config.json): expected a number at least 0",
        ),
        ({"hidden_dropout_prob": 1.0}, "at least 0 and below 1, found 1.0"),
        ({"pad_token_id": 61}, "pad_token_id: expected a number from 0 to 60, found 61"),
        ({"pad_token_id": -1}, "found -1"),
        ({"initializer_range": -0.02}, "initializer_range: expected a number at least 0, found -0.02"),
        ({"id2label": {"0": "a", "1": ""}}, "id2label: expected a name for each class"),
        ({"id2label": []}, "id2label: expected names"),
        ({"num_labels": True, "id2label": None}, "num_labels: expected a positive int, found true"),
    ],
)
def test_numbers_that_no_model_has(changed, config: dict[str, Any], said: str):
    folder = changed(config)
    with pytest.raises(ConfigError) as error:
        models.load(folder)
    assert said in str(error.value)
    assert str(error.value).startswith(str(folder / "config.json"))


def test_names_of_classes_may_repeat(changed, tmp_path: Path):
    """As those of ImageNet do in released checkpoints: they are written back, and told apart where they are shown."""
    names = {"0": "crane", "1": "kite", "2": "crane"}
    model, params, config, tokenizer = models.load(changed({"id2label": names}))
    assert config.label_names == ("crane", "kite", "crane")
    models.save(tmp_path / "saved", model, params, tokenizer)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["id2label"] == names
    assert distinct_names(config.label_names) == ("crane (0)", "kite", "crane (2)")


@pytest.mark.parametrize("name", ["model_type", "architectures"])
def test_names_of_another_type(changed, name: str):
    with pytest.raises((DataError, CheckpointError)):
        models.load(changed({name: [[]]}))


def test_more_layers_than_tensors_cost_nothing(changed):
    folder = changed({"num_hidden_layers": 10_000})
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"config\.json says 10,000 layers, and the checkpoint has \d+ tensors"):
        models.load(folder)
    assert time.perf_counter() - started < 1
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_layers_that_the_tensors_do_not_have(changed):
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.3\.output\.dense\.weight: not in the checkpoint"):
        models.load(changed({"num_hidden_layers": 4}))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite(changed, value: float, kind: Any):
    weight = load_file(SPAN / "model.safetensors")[WEIGHT].astype(kind)
    weight[1, 1] = value
    with pytest.raises(CheckpointError, match=f"weights that are NaN or infinite, in {WEIGHT}"):
        models.load(changed(tensors={WEIGHT: weight}))


def test_a_number_beyond_float32(changed):
    weight = load_file(SPAN / "model.safetensors")[WEIGHT].astype(np.float64)
    assert models.load(changed(tensors={WEIGHT: weight})).config.width == 16
    weight[0, 0] = 1e300
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        models.load(changed(tensors={WEIGHT: weight}))


@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        (np.int8, "I8"),
        (np.int64, "I64"),
        (np.bool_, "BOOL"),
        (np.complex64, "C64"),
        (ml_dtypes.float8_e4m3fn, "F8_E4M3"),
        (ml_dtypes.float8_e5m2, "F8_E5M2"),
    ],
)
def test_weights_of_other_kinds(changed, kind: Any, stored: str):
    weight = load_file(SPAN / "model.safetensors")[WEIGHT].astype(kind)
    with pytest.raises(
        CheckpointError, match=rf"expected weights stored as F32, F16, BF16, F64, found\n  {WEIGHT}: {stored}"
    ):
        models.load(changed(tensors={WEIGHT: weight}))


def test_weights_beyond_float16_are_not_saved_in_it(changed, tmp_path: Path):
    weight = load_file(SPAN / "model.safetensors")[WEIGHT].copy()
    weight[0, 0] = 1e5
    loaded = models.load(changed(tensors={WEIGHT: weight}))
    with pytest.raises(CheckpointError, match=f"{WEIGHT}: not finite in float16; nothing was saved"):
        models.save(tmp_path / "half", loaded.model, loaded.params, dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_save_that_stopped_between_its_renames_is_taken_up(tmp_path: Path):
    loaded = models.load(SPAN)
    models.save(tmp_path / "a", loaded.model, loaded.params)
    left = tmp_path / ".unfinished-999999999@elsewhere-a.old"
    (tmp_path / "a").rename(left)
    broken = {**loaded.params, "encoder": {}}
    with pytest.raises(CheckpointError, match="missing"):
        models.save(tmp_path / "a", loaded.model, broken)
    assert models.load(tmp_path / "a").config == loaded.config
    models.save(tmp_path / "a", loaded.model, loaded.params)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def sharded(folder: Path) -> tuple[Path, dict[str, Any]]:
    loaded = models.load(SPAN)
    models.save(folder, loaded.model, loaded.params, shard_bytes=8000)
    path = folder / "model.safetensors.index.json"
    return path, json.loads(path.read_text())


def test_a_tensor_in_two_shards(tmp_path: Path):
    path, index = sharded(tmp_path / "a")
    first, second = sorted(set(index["weight_map"].values()))[:2]
    moved = load_file(path.parent / first)
    save_file(load_file(path.parent / second) | {name: moved[name] for name in list(moved)[:1]}, path.parent / second)
    with pytest.raises(CheckpointError, match=f"is in two files, {first} and {second}"):
        models.load(path.parent)


def test_a_tensor_in_another_shard_than_the_index_says(tmp_path: Path):
    path, index = sharded(tmp_path / "a")
    name = "qa_outputs.bias"
    there = index["weight_map"][name]
    index["weight_map"][name] = next(file for file in index["weight_map"].values() if file != there)
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"does not match its shards: elsewhere: {name} in {there}"):
        models.load(path.parent)


@pytest.mark.parametrize("index", [{"weight_map": {"x": 5}}, {"weight_map": []}, {}, [], {"weight_map": {"x": None}}])
def test_an_index_of_something_else(tmp_path: Path, index: Any):
    path, _ = sharded(tmp_path / "a")
    path.write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"model\.safetensors\.index\.json: "):
        models.load(path.parent)
