"""What a run leaves behind, the ways it can start, and what its step compiles to."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary import models
from bestiary.data import Corpus, train_tokenizer
from bestiary.models.encoders.bert import BertConfig
from bestiary.models.encoders.electra import ElectraConfig
from bestiary.train.bench.pretrain import needed_operations
from bestiary.train.cli import main
from bestiary.train.errors import RunError
from bestiary.train.pretrain import data as pretrain_data
from bestiary.train.pretrain.config import PretrainConfig, upgrade
from bestiary.train.pretrain.loop import train_step
from bestiary.train.pretrain.masking import Masking
from bestiary.train.pretrain.mlm_pairs import MaskedWordsAndNextSentence
from bestiary.train.pretrain.model import Folders, make_model
from bestiary.train.pretrain.objective import Network
from bestiary.train.pretrain.rtd import ReplacedTokens
from bestiary.train.progress import Progress
from bestiary.train.sharding import Replicas


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_run_folder_is_complete(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    assert names == {
        "config.json", "metrics.jsonl", "results.json", "curves.png", "checkpoints", "tensorboard", "model",
        "run.lock", "samples.txt", "speeds.jsonl",
    }  # fmt: skip
    assert (uninterrupted / "curves.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((uninterrupted / "results.json").read_text())
    last = metrics(uninterrupted)[-1]
    assert results["held_out"] == {key.removeprefix("eval/"): value for key, value in last.items() if key != "step"}
    assert results["seed"] == 0
    assert results["real_tokens_per_second"] > 0
    loaded = models.load(uninterrupted / "model")
    assert sum(leaf.size for leaf in jax.tree.leaves(loaded.params)) == results["parameters"]
    assert loaded.tokenizer.vocab_size == loaded.config.vocab_size


def test_training_learns(uninterrupted):
    losses = [record["mlm_loss"] for record in metrics(uninterrupted) if "mlm_loss" in record]
    assert losses[-1] < losses[0] - 0.1


def test_resuming_from_a_named_checkpoint_goes_on_as_that_run_would(workshop, uninterrupted):
    step = sorted(int(path.stem) for path in (uninterrupted / "checkpoints").glob("*.json"))[0]
    out = workshop.folder / "resumed-elsewhere"
    said = workshop.pretrain(out, "--resume-from", str(uninterrupted / "checkpoints" / str(step)))
    assert f"resuming from step {step}" in said
    found = (out / "model" / "model.safetensors").read_bytes()
    assert found == (uninterrupted / "model" / "model.safetensors").read_bytes()
    assert metrics(out) == [record for record in metrics(uninterrupted) if record["step"] > step]


def test_starting_from_weights(workshop, uninterrupted):
    out, model = workshop.folder / "from-weights", str(uninterrupted / "model")
    said = workshop.pretrain(out, "--init-from", model)  # and its tokenizer
    assert "starting from the weights of" in said
    assert metrics(out)[0]["mlm_loss"] < metrics(uninterrupted)[0]["mlm_loss"] - 0.05


def test_a_pretrained_run_fills_masks(uninterrupted, capsys):
    assert main(["predict", str(uninterrupted), "--text", "Ban [MASK] liko [MASK].", "[MASK]"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert [len(first["masks"]), len(second["masks"])] == [2, 1]
    for best in (*first["masks"], *second["masks"]):
        chances = [word["probability"] for word in best]
        assert len(best) == 5
        assert chances == sorted(chances, reverse=True)
        assert 0 < sum(chances) <= 1
    assert main(["predict", str(uninterrupted), "--text", "Ban."]) == 1
    assert "'Ban.': expected [MASK] in place of a word" in capsys.readouterr().err
    assert main(["predict", str(uninterrupted), "--question", "Ban?", "--context", "Ban."]) == 1
    assert "was pretrained: it predicts masked words" in capsys.readouterr().err


def test_two_phases_and_a_ramp(workshop):
    out = workshop.folder / "phases"
    flags = ["--phases", "32:3", "64:3:0.0005", "--batch-ramp", "128:3", "--optimizer", "stable-adamw"]
    workshop.pretrain(
        out, *flags, sequence_length=None, steps=None, evaluate_every="0", evaluation_rows="16", log_every="1"
    )
    records = [record for record in metrics(out) if "total_tokens" in record]
    assert records[-1]["step"] == 6
    assert records[-1]["learning_rate"] == pytest.approx(0.0005 / 3, rel=1e-3)  # the last of three steps down
    tokens = np.diff([0, *(record["total_tokens"] for record in records)])
    assert np.abs(tokens / np.repeat([128, 512], 3) - 1).max() < 0.25


def test_phases_of_the_configuration():
    config = PretrainConfig(phases=("128:90", "512:10:1e-4"), batch_tokens=4096)
    assert config.plan == ((128, 32, 90, None, False), (512, 8, 10, 1e-4, False))


def test_a_batch_ramp_cuts_the_phases():
    config = PretrainConfig(phases=("128:90", "512:10:1e-4"), batch_tokens=4096, batch_ramp=("512:30", "1024:65"))
    assert config.plan == (
        (128, 4, 30, None, False), (128, 8, 60, None, True), (512, 2, 5, 1e-4, False), (512, 8, 5, None, True),
    )  # fmt: skip
    for ramp, message in (
        (("100:30",), "--batch-ramp 100 is not a multiple of the sequence length 128"),
        (("512:101",), "--batch-ramp has more steps than the run"),
        (("512",), "--batch-ramp 512: expected TOKENS:STEPS"),
    ):
        with pytest.raises(RunError, match=message):
            PretrainConfig(phases=("128:90", "512:10"), batch_tokens=4096, batch_ramp=ramp)


def test_a_ramp_reads_on_where_the_smaller_batches_ended(monkeypatch):
    class Rows:
        """Rows by number, from the first; the state is the next one."""

        def __init__(self, size: int):
            self.size, self.at = size, 0

        def __next__(self):
            self.at += self.size
            return list(range(self.at - self.size, self.at))

        def get_state(self):
            return self.at

        def set_state(self, state):
            self.at = state

    monkeypatch.setattr(pretrain_data, "make_rows", lambda *_: None)
    monkeypatch.setattr(pretrain_data, "training_batches", lambda _, *, batch_rows, **__: Rows(batch_rows))
    config = PretrainConfig(phases=("4:3", "8:2"), batch_tokens=16, batch_ramp=("4:1", "8:1"))
    batches = pretrain_data.PhasedBatches(config, None, None, lambda _: (0, 1))  # type: ignore[arg-type]
    assert [next(batches) for _ in range(5)] == [[0], [1, 2], [3, 4, 5, 6], [0, 1], [2, 3]]


def test_a_tokenizer_is_trained_once_for_a_corpus(workshop, tmp_path, monkeypatch):
    trained = []

    def train(*arguments, **settings):
        trained.append(settings["vocab_size"])
        return train_tokenizer(*arguments, **settings)

    monkeypatch.setattr(pretrain_data, "train_tokenizer", train)
    corpus, sizes = Corpus([workshop.folder / "corpus"]), (120, 120, 150, 120)
    configs = [PretrainConfig(cache=tmp_path, model="bert-tiny", vocab_size=size) for size in sizes]
    folders = [pretrain_data.trained_tokenizer(config, corpus, Progress()) for config in configs]
    assert trained == [120, 150]
    assert folders[0] == folders[1] == folders[3] != folders[2]
    assert all((folder / "vocab.txt").exists() for folder in folders)


def test_bench_writes_its_figures(workshop, tmp_path, capsys):
    out = tmp_path / "bench.json"
    flags = {"model": "bert-tiny", "sequence-length": "32", "rows": "8", "steps": "4", "skip": "2", "warmup": "1"}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    corpus = ["--corpus", str(workshop.folder / "corpus"), "--cache", str(workshop.folder / "cache")]
    assert main(["bench", "pretrain", *corpus, *words, "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert 0 < printed["tokens"] <= 4 * 8 * 32
    assert printed["real_tokens_per_second"] > 0
    assert printed["pipeline_tokens_per_second"] > 0
    assert printed["held_out"]["loss"] > 0
    assert 0 < printed["cpu_time"]["share_of_matmul_rate"] < 1


def test_operations_of_several_networks():
    """A generator's and a teacher's count too: three passes of what is trained, one of what is not."""
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]], np.int32)
    tokens, area = 11, 9 + 4 + 36

    def by_hand(layers, width, inner, head):
        layer = tokens * (4 * width * width + 2 * width * inner) + 2 * width * area  # products of two numbers
        return 2 * (layers * layer + head)

    config = ElectraConfig(vocab_size=50, width=64, layers=2, heads=1, feed_forward=128, embedding_size=24,
                           generator_fraction=0.5)  # fmt: skip
    student = BertConfig(vocab_size=50, width=32, layers=1, heads=2, feed_forward=64)
    rtd = ReplacedTokens(MASKING, None, Folders()).networks(config)  # pyright: ignore[reportArgumentType]
    expected = 3 * (by_hand(2, 32, 128, 3 * 24 * (32 + 50)) + by_hand(2, 64, 128, tokens * 64 * 65))
    assert needed_operations(rtd, {"segment_ids": segments}, masked=3) == expected
    taught = (Network(student, "all"), Network(config, "nothing", trained=False))
    expected = 3 * by_hand(1, 32, 64, tokens * 32 * (32 + 50)) + by_hand(2, 64, 128, 0)
    assert needed_operations(taught, {"segment_ids": segments}, masked=3) == expected


@pytest.fixture(scope="module")
def batch() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    rows, length, examples = 4, 16, 2
    return dict(
        input_ids=jnp.asarray(rng.integers(5, 60, (rows, length)), jnp.int32),
        segment_ids=jnp.ones((rows, length), jnp.int32),
        position_ids=jnp.tile(jnp.arange(length, dtype=jnp.int32), (rows, 1)),
        token_type_ids=jnp.zeros((rows, length), jnp.int32),
        row_ids=jnp.stack([jnp.zeros(rows, jnp.uint32), jnp.arange(rows, dtype=jnp.uint32)], 1),
        cls_positions=jnp.zeros((rows, examples), jnp.int32),
        next_sentence_labels=jnp.ones((rows, examples), jnp.int32),
        next_sentence_weights=jnp.asarray([[1.0, 0.0]] * rows),
    )


def update_of(**changes):
    """A small model's learner, and the step that trains it."""
    sizes = dict(vocab_size=60, width=16, layers=2, heads=2, feed_forward=32, positions=16)
    model, learner = make_model(PretrainConfig(), BertConfig(**{**sizes, **changes}), OBJECTIVE.head)

    def step(state, batch):
        return train_step(state, batch, Replicas(), objective=OBJECTIVE, model=model, learner=learner, accumulate=1)

    return learner, jax.jit(step)


MASKING = Masking("token", 0.15, 4, np.arange(60) < 5, np.zeros(60, bool))
OBJECTIVE = MaskedWordsAndNextSentence(MASKING, None)  # pyright: ignore[reportArgumentType]


def program_size(batch: dict[str, jax.Array], **changes) -> int:
    """Lines of the step's program, as the compiler gets it."""
    learner, step = update_of(**changes)
    return step.lower(learner.shapes(), batch).as_text().count("\n")


def test_program_does_not_grow_with_depth_under_scan(batch):
    sizes = [program_size(batch, layers=layers) for layers in (3, 8)]
    assert sizes[1] == sizes[0]
    written_out = program_size(batch, layers=8, scan_layers=False)
    assert written_out > 2 * sizes[1]  # what the test would see if scanning were lost


def test_weights_of_zero_teach_nothing(batch):
    """Unused [CLS] slots change neither the loss nor the update."""
    learner, step = update_of()
    state = learner.make()
    other = {**batch, "next_sentence_labels": batch["next_sentence_labels"].at[:, 1].set(0)}
    first, sums = step(state, batch)
    second, others = step(state, other)
    assert sums["nsp_loss"][1] == len(batch["input_ids"])
    jax.tree.map(np.testing.assert_array_equal, (first.params, sums), (second.params, others))
    moved = jax.tree.map(lambda after, before: bool((after != before).any()), first.params, state.params)
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("rows", ["sentences", "full-sentences", "doc-sentences"])
def test_masked_words_alone(workshop, rows):
    """No next-sentence head, and no word of it in metrics, results and model; rows without pairs."""
    out, resumed = workshop.folder / rows, workshop.folder / f"{rows}-resumed"
    flags = ["--objective", "mlm", "--rows", rows, "--masking", "word", "--schedule", "wsd"]
    settings = dict(steps="6", evaluate_every="3", checkpoint_every="3")
    said = workshop.pretrain(out, *flags, **settings)
    assert "nsp" not in said
    assert "nan" not in said
    written = (out / "metrics.jsonl").read_text() + (out / "results.json").read_text()
    assert "nsp" not in written
    held_out = json.loads((out / "results.json").read_text())["held_out"]
    assert held_out["loss"] == held_out["mlm_loss"]
    assert json.loads((out / "model" / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]
    if (
        rows == "doc-sentences"
    ):  # one run goes on from a checkpoint as if never stopped: the stream's state is tested of all
        workshop.pretrain(resumed, *flags, "--resume-from", str(out / "checkpoints" / "3"), **settings)
        found, expected = ((folder / "model" / "model.safetensors").read_bytes() for folder in (resumed, out))
        assert found == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--objective", "rtd"], "--objective rtd: BERT can learn mlm+nsp, mlm."),
        (["--rows", "full-sentences"], "--rows full-sentences: --objective mlm+nsp has rows of its own"),
        (["--no-next-sentence"], "--no-next-sentence is now --objective mlm"),
    ],
)
def test_what_cannot_be_learnt_is_refused(workshop, tmp_path, capsys, flags, message):
    assert main(workshop.arguments(tmp_path / "run", *flags)) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_folder_of_before_goes_on(uninterrupted, tmp_path):
    """Its settings had other names; what it learnt beside masked words cannot go on without it."""
    stored = json.loads((uninterrupted / "config.json").read_text())
    old = {name: value for name, value in stored.items() if name not in ("objective", "rows", "parallelism")}
    old |= {"next_sentence": True, "spread": stored["parallelism"]}
    old["optim"] = {"decay" if name == "schedule" else name: value for name, value in stored["optim"].items()}
    assert upgrade(old) == stored
    with pytest.raises(RunError, match="begun by an earlier version with --no-next-sentence"):
        upgrade({**old, "next_sentence": False})
