"""GPT-1, GPT-2, GPT-3 and GPT-Neo: released sizes and files, and generation as the reference's."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file, save_file

from bestiary import models
from bestiary.models import registry
from bestiary.models.checkpoints.config import ConfigError
from bestiary.models.checkpoints.parity import check
from bestiary.models.checkpoints.tables import CheckpointError, flatten
from bestiary.models.decoders.gpt1 import GPT1Config
from bestiary.models.decoders.gpt2 import GPT2Config
from bestiary.models.decoders.gptneo import GPTNeoConfig
from bestiary.train.commands.parity import describe
from bestiary.train.generate.config import DecodeConfig
from bestiary.train.generate.generator import Generator
from bestiary.train.generate.released import decode_config, reference_generate
from bestiary.train.optim.optimizer import reference_optimizer

FIXTURES = Path(__file__).parents[1] / "fixtures"

# Parameters of the language model, in which the output shares the word embeddings.
PARAMETERS = {
    # Radford et al. 2018, 4.1, gives no number; that of the released checkpoint, openai-community/openai-gpt.
    "openai-gpt": 116_534_784,
    # The released checkpoints'; Radford et al. 2019, table 2, says 117M, 345M, 762M and 1542M, which was corrected.
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    # EleutherAI/gpt-neo-125m, -1.3B and -2.7B.
    "gpt-neo-125m": 125_198_592,
    "gpt-neo-1.3b": 1_315_575_808,
    "gpt-neo-2.7b": 2_651_307_520,
}
# Brown et al. 2020, table 2.1, which rounds, in millions. 13B is 12.85B with a width that its heads divide.
GPT3_MILLIONS = {
    "gpt3-small": 125,
    "gpt3-medium": 350,
    "gpt3-large": 760,
    "gpt3-xl": 1_300,
    "gpt3-2.7b": 2_700,
    "gpt3-6.7b": 6_700,
    "gpt3-13b": 13_000,
    "gpt3-175b": 175_000,
}


def parameters(size: str) -> int:
    family = registry.presets()[size]
    model = family.build("causal_lm", family.config.preset(size))
    shapes = jax.eval_shape(lambda: registry.init_params(model, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(("size", "count"), PARAMETERS.items())
def test_parameters_are_the_released_ones(size: str, count: int) -> None:
    assert parameters(size) == count


@pytest.mark.parametrize(("size", "millions"), GPT3_MILLIONS.items())
def test_parameters_of_gpt3_are_those_of_the_paper(size: str, millions: int) -> None:
    assert parameters(size) / 1e6 == pytest.approx(millions, rel=0.03)


def old_checkpoint(folder: Path, name: str, dtype: Any) -> Path:
    """A fixture as older versions stored it: with causal masks, and for GPT-2 without the prefix."""
    stored = json.loads((FIXTURES / name / "config.json").read_text())
    tensors = load_file(FIXTURES / name / "model.safetensors")
    causal = np.tril(np.ones((20, 20), bool))
    for layer in range(3):
        neo = name.startswith("gptneo")
        at = f"transformer.h.{layer}.attn" + (".attention" if neo else "")
        seen = causal & ~np.tril(causal, -3) if neo and layer else causal
        tensors[f"{at}.bias"] = seen[None, None].astype(dtype)
        tensors[f"{at}.masked_bias"] = np.array(-1e9 if neo else -1e4, np.float32)
    if name == "gpt2_lm":
        tensors = {key.removeprefix("transformer."): value for key, value in tensors.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(stored))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("name", "dtype"), [("gpt2_lm", np.float32), ("gpt1_lm", np.uint8), ("gptneo_lm", bool)])
def test_older_files_keep_their_names_and_masks(tmp_path: Path, name: str, dtype: Any) -> None:
    folder = old_checkpoint(tmp_path / "old", name, dtype)
    model, params, config, _ = models.load(folder)
    newer = models.load(FIXTURES / name)
    for (path, leaf), (other, expected) in zip(flatten(params), flatten(newer.params), strict=True):
        assert path == other
        np.testing.assert_array_equal(leaf, expected)
    models.save(tmp_path / "new", model, params)
    before, after = (load_file(at / "model.safetensors") for at in (folder, tmp_path / "new"))
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert (after[key].dtype, after[key].tobytes()) == (value.dtype, value.tobytes()), key
    # A model with another head is saved under today's names.
    classifier = models.load(folder, head="classification")
    models.save(tmp_path / "classifier", classifier.model, classifier.params)
    assert "transformer.wpe.weight" in load_file(tmp_path / "classifier" / "model.safetensors") or name == "gpt1_lm"
    assert config.unprefixed == (name == "gpt2_lm")


def test_a_mask_that_is_not_causal_and_an_untied_output_are_refused(tmp_path: Path) -> None:
    folder = old_checkpoint(tmp_path / "old", "gpt2_lm", np.float32)
    tensors = load_file(folder / "model.safetensors")
    wrong = dict(tensors)
    wrong["h.1.attn.bias"] = np.ones_like(tensors["h.1.attn.bias"])
    wrong["lm_head.weight"] = tensors["wte.weight"] + 1
    save_file(wrong, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"h\.1\.attn\.bias: expected the constant.*") as raised:
        models.load(folder)
    assert "lm_head.weight: differs from" in str(raised.value)


def test_settings_that_are_not_implemented_are_refused() -> None:
    stored = GPT2Config().to_json()
    assert stored["n_inner"] is None
    assert GPT2Config.from_json({"model_type": "gpt2", "n_embd": 96, "n_inner": None}).feed_forward == 384
    with pytest.raises(ConfigError, match="scale_attn_by_inverse_layer_idx: only false"):
        GPT2Config.from_json(stored | {"scale_attn_by_inverse_layer_idx": True})
    with pytest.raises(ConfigError, match="attention_types: expected pairs"):
        GPTNeoConfig.from_json({"model_type": "gpt_neo", "attention_types": ["global"]})
    with pytest.raises(ConfigError, match=r'expected "global" or "local" for each of 24 layers, found 2'):
        GPTNeoConfig.from_json({"model_type": "gpt_neo", "attention_types": [[["global", "local"], 1]]})
    with pytest.raises(ConfigError, match="afn: only"):
        GPT1Config.from_json({"model_type": "openai-gpt", "afn": "tanh"})


def test_residual_maps_are_drawn_smaller() -> None:
    family = registry.family_named("gpt2")
    config = GPT2Config(vocab_size=500, width=64, layers=8, heads=4, feed_forward=256, positions=400)
    model = family.build("causal_lm", config)
    params = nn.unbox(jax.jit(partial(registry.init_params, model))(jax.random.key(0)))["encoder"]
    layers, embeddings = params["layers"], params["embeddings"]
    found = {
        "word": embeddings["word"]["embedding"],
        "position": embeddings["position"]["embedding"],
        "query": layers["attention"]["query"]["kernel"],
        "out": layers["attention"]["out"]["kernel"],
        "outer": layers["feed_forward"]["outer"]["kernel"],
    }
    expected = {"word": 0.02, "position": 0.01, "query": 0.02, "out": 0.005, "outer": 0.005}
    assert {name: float(x.std()) for name, x in found.items()} == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("name", ["gpt1_lm", "gpt2_lm", "gptneo_local_lm"])
def test_shared_fixtures(shared: Path, name: str) -> None:
    report = check(shared / "parity" / name, make_optimiser=reference_optimizer, generate=reference_generate)
    assert report.passed, "\n".join(describe(report))
    assert report.generated_differently == (0 if name == "gpt2_lm" else None)


# Generation


def prompts(name: str) -> list[list[int]]:
    given = load_file(FIXTURES / name / "expected.safetensors")["input.input_ids"]
    return [row[:length].tolist() for row, length in zip(given, (9, 6, 4), strict=True)]


@pytest.mark.parametrize("name", ["gpt2_lm", "gptneo_lm"])
def test_what_the_reference_generates(name: str) -> None:
    """Greedy and by beams, with penalties over prompt and output, a minimum length, and ends."""
    loaded = models.load(FIXTURES / name)
    for settings in json.loads((FIXTURES / name / "generations.json").read_text()):
        sequences, scores = settings.pop("sequences"), settings.pop("scores", None)
        end = settings.pop("eos_token_id", loaded.config.eos_token_id)
        model = loaded.model.clone(config=dataclasses.replace(loaded.config, eos_token_id=end))
        found = Generator(model, loaded.params, decode_config(settings), rows=3)(prompts(name))
        for row, expected in zip(found, sequences, strict=True):
            for hypothesis, sequence in zip(row, expected, strict=True):
                ended = sequence[: sequence.index(end)] if end in sequence else sequence
                assert hypothesis.tokens == ended, settings
        if scores is not None:
            np.testing.assert_allclose([[h.score for h in row] for row in found], scores, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt1_lm", "gpt2_lm", "gptneo_lm"])
def test_each_step_is_as_the_whole_text_at_once(name: str) -> None:
    """Logits by the cache, of prompts of unlike length in one batch, are those of each text alone without one."""
    model, params, config, _ = models.load(FIXTURES / name)
    given = prompts(name)
    found = Generator(model, params, DecodeConfig(max_length=9), rows=3)(given)
    steps = model.incremental()
    prepared = steps.prepare(params)
    lengths = [len(prompt) - 1 for prompt in given]
    ids = np.zeros((3, max(lengths)), np.int32)
    for row, prompt in zip(ids, given, strict=True):
        row[: len(prompt) - 1] = prompt[:-1]
    segments = (np.arange(ids.shape[1]) < np.array(lengths)[:, None]).astype(np.int32)
    texts = [[*prompt, *row[0].tokens] for prompt, row in zip(given, found, strict=True)]
    padded = np.zeros((3, max(map(len, texts))), np.int32)  # no token sees what follows
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    whole = np.asarray(jax.jit(model.apply)({"params": params}, padded))
    memory, cache = jax.jit(steps.start)(prepared, ids, segments), steps.cache(3, 9)
    step = jax.jit(steps.step)
    for age in range(9):
        tokens = jnp.array([[text[length + age]] for text, length in zip(texts, lengths, strict=True)])
        places = jnp.full((3, 1), age, jnp.int32)
        mask = jnp.broadcast_to(jnp.arange(9) <= age, (3, 1, 9))
        logits, cache, _ = step(prepared, memory, cache, tokens, jnp.full(3, age, jnp.int32), places, mask)
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(logits[row, 0], whole[row][length + age], atol=1e-5)
    assert config.max_length == 20
