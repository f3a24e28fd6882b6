"""A small corpus, and the real command to run on it."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

STEPS = 24
WORDS = [a + b for a in ("ba", "ko", "li", "mu", "ter", "san", "vo", "gri") for b in ("n", "rd", "st", "lo", "ma", "x")]
MAIN = "from bestiary.train.cli import main; raise SystemExit(main())"


def write_corpus(folder: Path) -> Path:
    """Thirty documents of made-up sentences."""
    generator = random.Random(0)
    folder.mkdir(parents=True)
    for number in range(30):
        sentences = [
            " ".join(generator.choices(WORDS, k=generator.randint(4, 14))).capitalize() + "." for _ in range(40)
        ]
        (folder / f"{number:02}.txt").write_text("\n\n".join(sentences))
    return folder


@dataclass
class Workshop:
    """Runs `bestiary pretrain` on the small corpus."""

    folder: Path

    def arguments(self, out: Path, *more: str, **settings: str | None) -> list[str]:
        """The command's words; `settings` replace the usual flags, None leaves one out."""
        flags = {
            "corpus": str(self.folder / "corpus"), "cache": str(self.folder / "cache"), "vocab_size": "200",
            "model": "bert-tiny", "sequence_length": "32", "batch_tokens": "512", "steps": str(STEPS),
            "log_every": "4", "evaluate_every": "8", "checkpoint_every": "5", "evaluation_rows": "32", "out": str(out),
        } | settings  # fmt: skip
        pairs = ((f"--{name.replace('_', '-')}", value) for name, value in flags.items() if value is not None)
        return ["pretrain", *(word for pair in pairs for word in pair), *more]

    def start(self, *arguments: str, devices: int = 1) -> subprocess.Popen[str]:
        environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
        command = [sys.executable, "-c", MAIN, *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def run(self, *arguments: str, devices: int = 1) -> tuple[int, str]:
        """(exit status, what was said)."""
        process = self.start(*arguments, devices=devices)
        said = process.communicate(timeout=300)[1]
        return process.returncode, said

    def pretrain(self, out: Path, *more: str, devices: int = 1, **settings: str | None) -> str:
        """Run to the end; what was said."""
        status, said = self.run(*self.arguments(out, *more, **settings), devices=devices)
        assert status == 0, said
        return said


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Workshop:
    """One of all of pytest's workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "workshop"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "corpus.lock"):
        if not (folder / "corpus").exists():
            write_corpus(folder / "corpus")
    return Workshop(folder)


@pytest.fixture(scope="session")
def uninterrupted(workshop) -> Path:
    """The folder of a run that nothing disturbed: to be read and copied, not changed."""
    out = workshop.folder / "uninterrupted"
    with FileLock(workshop.folder / "uninterrupted.lock"):
        if not (out / "results.json").exists():
            workshop.pretrain(out, "--keep", "4")
    return out


@pytest.fixture(scope="session")
def sentence_encoder(tmp_path_factory) -> Path:
    """A tiny encoder with its tokenizer, drawn at random, as a folder of sentence-transformers."""
    import json

    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import linen as nn

    from bestiary import models
    from bestiary.data import load_tokenizer
    from bestiary.models.encoders.bert import Bert, BertConfig

    folder = tmp_path_factory.mktemp("sentences") / "encoder"
    vocabulary = folder.parent / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    sizes = dict(width=16, layers=2, heads=2, feed_forward=24, positions=64)
    model = Bert(BertConfig(vocab_size=len(WORDS) + 5, **sizes))
    random = np.random.default_rng(0)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))["params"]
    params = jax.tree.map(lambda leaf: np.float32(random.normal(size=leaf.shape) * 0.5), shapes)
    models.save(folder, model, params, load_tokenizer(vocabulary))
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    modules += [{"path": f"{i}_{name}", "type": f"x.{name}"} for i, name in ((1, "Pooling"), (2, "Normalize"))]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12, "do_lower_case": False}))
    return folder


@pytest.fixture(scope="session")
def made_up() -> Callable[..., list[str]]:
    """(count, seed) -> sentences of 0 to 15 words of the tiny encoder's vocabulary."""

    def sentences(count: int, seed: int = 0) -> list[str]:
        generator = random.Random(seed)
        return [" ".join(generator.choices(WORDS, k=generator.randint(0, 15))) for _ in range(count)]

    return sentences
