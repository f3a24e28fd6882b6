"""Fine-tuning end to end on tiny models: what is learnt, what is left behind, what is refused, and that it is exact."""

import io
import json
import math
import random
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bestiary import models
from bestiary.data import load_tokenizer
from bestiary.data.batches import TrainingBatches, assemble
from bestiary.data.packing import pack
from bestiary.data.tasks.glue import GLUE
from bestiary.models.checkpoints.tables import flatten
from bestiary.models.encoders.bert import Bert, BertConfig
from bestiary.train.adapt.layer_rates import Depths, layer_rates
from bestiary.train.cli import main
from bestiary.train.config import ParallelConfig
from bestiary.train.finetune.commands.glue import GlueConfig
from bestiary.train.finetune.commands.glue_suite import GlueSuiteConfig, planned
from bestiary.train.finetune.config import FinetuneConfig
from bestiary.train.finetune.model import load_model
from bestiary.train.finetune.prediction import Predictor
from bestiary.train.finetune.tasks.glue import glue_task
from bestiary.train.finetune.tasks.glue_table import task_score
from bestiary.train.finetune.tasks.scores import metric, scored
from bestiary.train.progress import Progress
from bestiary.train.sharding import start_parallelism

GOOD, BAD = ("good", "fine", "great", "nice"), ("bad", "poor", "awful", "dull")
PLAIN = ("the", "film", "was", "a", "story", "of", "two", "men", "and", "one", "house", "in", "town")


def sentence(draw: random.Random, label: int) -> str:
    words = draw.choices(PLAIN, k=draw.randint(2, 12))
    words.insert(draw.randrange(len(words)), draw.choice((BAD, GOOD)[label]))
    return " ".join(words)


def write_encoder(folder: Path, layers: int) -> Path:
    """A tiny encoder, drawn at random, with its tokenizer."""
    config = BertConfig(
        vocab_size=32,
        width=32,
        layers=layers,
        heads=2,
        feed_forward=64,
        positions=64,
        dropout=0.0,
        attention_dropout=0.0,
        initializer_range=0.1,
    )
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *PLAIN]
    (folder / "vocab.txt").write_text("\n".join(pieces + [f"##{n}" for n in range(32 - len(pieces))]) + "\n")
    model = Bert(config)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))["params"]
    models.save(folder / "model", model, jax.device_get(params), load_tokenizer(folder / "vocab.txt"))
    return folder / "model"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"), 1)


@pytest.fixture(scope="module")
def sst2(tmp_path_factory) -> Path:
    """Sentences that one word decides, as SST-2's files."""
    folder = tmp_path_factory.mktemp("glue") / "SST-2"
    folder.mkdir()
    draw = random.Random(0)
    for split, count in (("train", 192), ("dev", 64)):
        rows = "".join(f"{sentence(draw, n % 2)}\t{n % 2}\n" for n in range(count))
        (folder / f"{split}.tsv").write_text(f"sentence\tlabel\n{rows}")
    rows = "".join(f"{n}\t{sentence(draw, n % 2)}\n" for n in range(20))
    (folder / "test.tsv").write_text(f"index\tsentence\n{rows}")
    return folder


FAST = ("--learning-rate", "1e-2", "--batch-size", "16", "--max-length", "32", "--log-every", "4")


@pytest.fixture(scope="module")
def finetuned(encoder, sst2, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "sst2"
    assert main([*command(encoder, sst2, out), "--epochs", "4", "--checkpoint-every", "5"]) == 0
    return out


def command(encoder: Path, sst2: Path, out: Path) -> list[str]:
    return ["finetune", "sst2", "--data", str(sst2), "--model", str(encoder), "--out", str(out), *FAST]


# --- what a run does and leaves behind --------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_everything_behind(finetuned):
    results = json.loads((finetuned / "results.json").read_text())
    assert results["metrics"]["dev"]["accuracy"] > 0.9
    assert results["metrics"]["dev"]["score"] == results["metrics"]["dev"]["accuracy"]
    assert results["seed"] == 0
    assert results["steps"] == 4 * 12
    assert results["examples"] == 4 * 192
    assert results["examples_per_second"] > 0
    assert results["real_tokens_per_second"] > 0
    records = [json.loads(line) for line in (finetuned / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "eval/accuracy" in record] == [12, 24, 36, 48]  # every epoch
    assert (finetuned / "curves.png").stat().st_size > 0
    assert any((finetuned / "tensorboard").iterdir())


def test_the_submission_is_what_the_server_takes(finetuned, sst2):
    lines = (finetuned / "predictions" / "SST-2.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in lines[1:]] == [str(n) for n in range(20)]
    right = sum(int(line.split("\t")[1]) == n % 2 for n, line in enumerate(lines[1:]))
    assert right >= 18
    assert len((finetuned / "predictions" / "dev" / "SST-2.tsv").read_text().splitlines()) == 65


def test_the_model_says_what_its_classes_are(finetuned):
    config = json.loads((finetuned / "model" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert config["label2id"] == {"negative": 0, "positive": 1}
    assert config["problem_type"] == "single_label_classification"
    loaded = models.load(finetuned / "model")
    assert set(loaded.params) == {"encoder", "classifier"}
    assert loaded.tokenizer.vocab_size == 32


def test_evaluating_again_gives_the_same_metrics(finetuned, sst2, tmp_path, capsys):
    assert main(["evaluate", str(finetuned), "--data", str(sst2), "--out", str(tmp_path / "again")]) == 0
    said = json.loads(capsys.readouterr().out)
    expected = json.loads((finetuned / "results.json").read_text())["metrics"]["dev"]
    assert said["metrics"] == pytest.approx(expected, abs=1e-6)
    assert said["examples"] == 64
    assert said["explained"] == {"score": "accuracy"}
    report = json.loads((tmp_path / "again" / "report" / "dev.json").read_text())
    assert report == json.loads((finetuned / "report" / "dev.json").read_text())
    counts = np.array(report["confusion"]["counts"])
    assert np.trace(counts) / counts.sum() == pytest.approx(expected["accuracy"])
    assert report["classes"]["positive"]["recall"] == pytest.approx(counts[1, 1] / counts[1].sum())
    assert "confusion" in (finetuned / "report" / "dev.txt").read_text()
    again = tmp_path / "again" / "predictions" / "dev" / "SST-2.tsv"
    assert again.read_text() == (finetuned / "predictions" / "dev" / "SST-2.tsv").read_text()


def test_what_the_last_evaluation_predicted_is_not_predicted_again(encoder, sst2, tmp_path, monkeypatch):
    predict, calls = Predictor.__call__, []

    def counted(self, params, features, stop=None):
        calls.append(features.count)
        return predict(self, params, features, stop)

    monkeypatch.setattr(Predictor, "__call__", counted)
    assert main([*command(encoder, sst2, tmp_path / "last"), "--steps", "1"]) == 0
    assert calls == [64, 20]
    few = ["--eval-examples", "10", "--no-test"]
    assert main([*command(encoder, sst2, tmp_path / "best"), "--steps", "1", "--select", "best", *few]) == 0
    assert calls[2:] == [10, 10], "the weights that were kept are read again"


def test_predicting_texts_and_files(finetuned, sst2, capsys, monkeypatch):
    assert main(["predict", str(finetuned), "--text", "the story was great", "a dull house"]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["label"] for one in said] == ["positive", "negative"]
    assert sum(said[0]["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert main(["predict", str(finetuned), "--input", str(sst2 / "test.tsv")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 20
    assert main(["predict", str(finetuned), "--text", "a", "--text-pair", "b"]) == 1
    assert "give --text, and no --text-pair" in capsys.readouterr().err
    assert main(["predict", str(finetuned), "--text", "caf\udce9"]) == 1
    assert "--text: not UTF-8: 'caf\\udce9'" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the story was great\na dull house\n")))
    assert main(["predict", str(finetuned)]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == said


def test_a_run_that_was_cut_off_goes_on_exactly(encoder, sst2, finetuned, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    draw = TrainingBatches.__next__
    for at in (7, 29):
        drawn = 0

        def counted(self):
            nonlocal drawn
            drawn += 1
            if drawn > at:  # noqa: B023
                raise Killed
            return draw(self)

        monkeypatch.setattr(TrainingBatches, "__next__", counted)
        assert main([*command(encoder, sst2, tmp_path / "run"), "--epochs", "4", "--checkpoint-every", "5"]) == 1
    monkeypatch.setattr(TrainingBatches, "__next__", draw)
    assert main([*command(encoder, sst2, tmp_path / "run"), "--epochs", "4", "--checkpoint-every", "5"]) == 0
    for name in ("metrics.jsonl", "predictions/SST-2.tsv", "task.json"):
        assert (tmp_path / "run" / name).read_text() == (finetuned / name).read_text(), name
    names = "model/model.safetensors", "model/config.json"
    assert all((tmp_path / "run" / name).read_bytes() == (finetuned / name).read_bytes() for name in names)


def test_the_best_weights_are_kept_and_a_run_that_gets_no_better_ends(encoder, sst2, tmp_path):
    flags = ["--epochs", "4", "--patience", "2", "--evaluate-every", "6"]
    assert main([*command(encoder, sst2, tmp_path / "run"), *flags]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = {record["step"]: record["eval/score"] for record in records if "eval/score" in record}
    best = max(scores, key=lambda step: (scores[step], -step))
    assert results["best"] == {"step": best, "score": scores[best]}
    assert results["metrics"]["dev"]["score"] == scores[best]
    assert results["steps"] == best + 2 * 6 < 48


def test_replicas_and_parts_give_the_same_numbers(encoder, sst2, finetuned, tmp_path):
    flags = ["--epochs", "4", "--parallel", "pmap", "--accumulate", "2"]
    assert main([*command(encoder, sst2, tmp_path / "run"), *flags]) == 0
    found, expected = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "run", finetuned)
    )
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for name in ("loss", "gradient_norm"):
        pairs = [(a[name], b[name]) for a, b in zip(found, expected, strict=True) if name in a][:4]
        np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-3)
    names = [folder / "predictions" / "SST-2.tsv" for folder in (tmp_path / "run", finetuned)]
    assert names[0].read_text() == names[1].read_text()


# --- packing and shapes -----------------------------------------------------------------------------------------------


def make_predictor(folder: Path, max_length: int = 32):
    task = glue_task("sst2", max_length)
    loaded = models.load(folder, head="classification", **task.model_changes())
    return task, loaded, Predictor(task, loaded.model, 0, start_parallelism(ParallelConfig()), Progress())


def padded(features, count: int, slots: int) -> dict[str, np.ndarray]:
    """The first `count` features, one a row of 32."""
    batch = {name: np.zeros((count, 32), np.int32) for name in ("input_ids", "segment_ids", "token_type_ids")}
    batch["feature_ids"] = np.tile(np.arange(count, dtype=np.int32)[:, None], (1, 32))
    batch["position_ids"] = np.tile(np.arange(32, dtype=np.int32), (count, 1))
    for name, dtype in (("cls_positions", np.int32), ("segment_weights", np.float32), ("labels", np.int32)):
        batch[name] = np.zeros((count, slots), dtype)
    for number in range(count):
        span = slice(features.starts[number], features.starts[number + 1])
        batch["input_ids"][number, : span.stop - span.start] = features.input_ids[span]
        batch["segment_ids"][number, : span.stop - span.start] = 1
    batch["labels"][:, 0], batch["segment_weights"][:, 0] = features.segment_fields["labels"][:count], 1
    return batch


def test_packed_examples_have_the_outputs_and_gradients_of_padded_ones(finetuned, sst2):
    task, loaded, _ = make_predictor(finetuned / "model")
    features = task.encode(loaded.tokenizer, task.read(sst2, "train", labelled=True)[:48])
    row_of, rows = pack(features.unit_lengths, 32, 4)
    assert rows < 32
    packed = assemble(features, np.arange(48), row_of, range(48), length=32, slots=4, pad_id=0)

    @jax.jit
    def run(params, batch):
        def loss(params):
            outputs = task.forward(loaded.model, params, batch, deterministic=True)
            return task.loss(outputs, batch)["loss"][0] / task.weight(batch), outputs

        with jax.default_matmul_precision("highest"):
            return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, logits), gradients = run(loaded.params, packed.batch)
    (expected_loss, expected), expected_gradients = run(loaded.params, padded(features, 48, 4))
    used = packed.features >= 0
    np.testing.assert_allclose(logits[used], expected[packed.features[used], 0], atol=1e-5)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), gradients, expected_gradients)


def test_texts_of_any_length_are_predicted_without_compiling_again(finetuned):
    task, loaded, predictor = make_predictor(finetuned / "model")
    params = jax.device_put(loaded.params)
    draw = random.Random(1)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    try:
        counts = []
        for longest in (3, 9, 28, 5, 17, 30):
            for count in (50, 64):
                texts = [" ".join(draw.choices(PLAIN, k=draw.randint(1, longest))) for _ in range(count)]
                predictor(params, task.encode(loaded.tokenizer, task.from_words({"text": texts})))
            counts.append(len(compiled))
    finally:
        jax.monitoring.clear_event_listeners()
    assert counts[0] >= 1
    assert counts[-1] <= 3, "one program for each of few numbers of rows"


# --- what trains ------------------------------------------------------------------------------------------------------


def test_rates_fall_by_one_factor_a_layer(encoder):
    config = FinetuneConfig(model=encoder, out=Path("runs/x"), layer_decay=0.5, freeze_layers=1)
    word, head = ("encoder", "embeddings", "word", "embedding"), ("classifier", "kernel")
    stack = np.array([1, 2, 3]).reshape(3, 1, 1)
    depths = Depths({word: np.array(0), ("encoder", "layers", "a", "kernel"): stack, head: np.array(4)}, 3)
    trains, scales = layer_rates(config, depths)
    assert trains is not None
    assert scales is not None
    kernel = scales(("encoder", "layers", "a", "kernel"))
    assert kernel.shape == (3, 1, 1)
    assert kernel.ravel().tolist() == [0.0, 0.25, 0.5]
    assert scales(word) == 0.5**4
    assert scales(head) == 1
    assert not trains(word)
    assert trains(("encoder", "layers", "a", "kernel"))
    assert layer_rates(FinetuneConfig(model=encoder, out=Path("runs/x")), depths) == (None, None)
    electra = FinetuneConfig(model=encoder, out=Path("runs/x"), layer_decay=0.5, electra_layer_decay=True)
    _, scales = layer_rates(electra, depths, electra=True)
    assert scales is not None
    assert scales(("encoder", "layers", "a", "kernel")).ravel().tolist() == [0.5**4, 0.5**3, 0.5**2]
    assert (scales(word), scales(head)) == (0.5**5, 1)


# --- other tasks ------------------------------------------------------------------------------------------------------


def test_a_regression_with_frozen_layers(tmp_path):
    """Pairs are rated in STS-B's format; what is frozen stays, whatever the weight decay and in a running mean too."""
    draw = random.Random(3)
    folder = tmp_path / "STS-B"
    folder.mkdir()
    for split, count in (("train", 96), ("dev", 40)):
        rows = ""
        for number in range(count):
            first, second = draw.choice((GOOD, BAD)), draw.choice((GOOD, BAD))
            texts = f"the {draw.choice(first)} film\ta {draw.choice(second)} story"
            rows += f"{number}\t{texts}\t{5.0 if first is second else 0.0}\n"
        (folder / f"{split}.tsv").write_text(f"index\tsentence1\tsentence2\tscore\n{rows}")
    encoder, out = write_encoder(tmp_path, 2), tmp_path / "run"
    flags = ["--steps", "4", "--max-length", "32", "--freeze-layers", "1", "--weight-decay", "0.1", "--ema", "0.5"]
    assert main(["finetune", "stsb", "--data", str(tmp_path), "--model", str(encoder), "--out", str(out), *flags]) == 0
    metrics = json.loads((out / "results.json").read_text())["metrics"]["dev"]
    assert set(metrics) == {"pearson", "spearman", "score", "loss"}
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["problem_type"] == "regression"
    assert list(config["id2label"]) == ["0"]
    answers = [line.split("\t")[1] for line in (out / "predictions/dev/STS-B.tsv").read_text().splitlines()[1:]]
    assert all(0 <= float(answer) <= 5 and len(answer) == 5 for answer in answers)

    before = dict(flatten(models.load(encoder, head="classification", num_labels=1).params))
    for path, leaf in flatten(models.load(out / "model").params):
        if "embeddings" in path:
            assert np.array_equal(leaf, before[path]), path
        elif "layers" in path:
            assert np.array_equal(leaf[0], before[path][0]), path
            # A key's bias shifts all scores of a query alike, so its gradient is zero but for rounding.
            assert path[-2:] == ("key", "bias") or not np.array_equal(leaf[1], before[path][1]), path
        elif path[0] != "classifier":
            assert not np.array_equal(leaf, before[path]), path


def test_a_table_of_ones_own(encoder, tmp_path, capsys):
    draw = random.Random(4)
    kinds = {"up": GOOD, "down": BAD, "so-so": ("house", "town")}
    rows = [
        {"said": f"{draw.choice(words)} {draw.choice(words)}", "mood": mood}
        for mood, words in kinds.items()
        for _ in range(40)
    ]
    (tmp_path / "moods.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    flags = ["--text", "said", "--label", "mood", "--model", str(encoder), "--out", str(out), *FAST, "--epochs", "6"]
    assert main(["finetune", "classification", "--train", str(tmp_path / "moods.jsonl"), *flags]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["metrics"]["dev"]["accuracy"] > 0.9
    assert results["training_examples"] == 108
    config = json.loads((out / "model" / "config.json").read_text())
    assert list(config["id2label"].values()) == ["down", "so-so", "up"]
    capsys.readouterr()
    assert main(["predict", str(out), "--text", "awful dull"]) == 0
    assert json.loads(capsys.readouterr().out)["label"] == "down"


def test_several_tasks_make_one_table(encoder, sst2, finetuned, tmp_path, capsys):
    """The suite plans its runs, and takes what is finished as it is."""
    flags = ["--seeds", "0", "--tasks", "sst2", "--epochs", "4", "--checkpoint-every", "5"]
    shutil.copytree(finetuned, tmp_path / "sst2" / "seed-0")
    config = json.loads((finetuned / "config.json").read_text())
    config |= {"data": str(sst2.parent)}
    for name in ("eval_examples", "no_test", "seeds"):  # as an earlier version wrote it
        del config["run"][name]
    (tmp_path / "sst2" / "seed-0" / "config.json").write_text(json.dumps(config))
    arguments = ["finetune", "glue", "--data", str(sst2.parent), "--model", str(encoder), "--out", str(tmp_path)]
    assert main([*arguments, *FAST, *flags]) == 0
    table = (tmp_path / "table.md").read_text()
    score = json.loads((finetuned / "results.json").read_text())["metrics"]["dev"]["accuracy"]
    assert f"| sst2 | accuracy | {score:.4f} | {score:.4f} |" in table
    assert f"| all | mean of the tasks' scores | {score:.4f} | |" in table
    assert json.loads((tmp_path / "results.json").read_text())["score"] == score


def test_a_suite_with_anything_bad_does_not_begin(encoder, sst2, tmp_path, capsys):
    arguments = ["finetune", "glue", "--model", str(encoder), "--tasks", "sst2", "rte", "--out", str(tmp_path / "runs")]
    data = tmp_path / "glue"
    shutil.copytree(sst2, data / "SST-2")
    (data / "RTE").mkdir()
    for split, label in (("train", "entailment"), ("dev", "perhaps")):
        rows = f"index\tsentence1\tsentence2\tlabel\n0\ta\tb\t{label}\n"
        (data / "RTE" / f"{split}.tsv").write_text(rows)
    assert main([*arguments, "--data", str(data)]) == 1
    assert "RTE/dev.tsv, line 2: the label 'perhaps' is not in the label set" in capsys.readouterr().err
    (data / "RTE" / "dev.tsv").write_text((data / "RTE" / "train.tsv").read_text())
    assert main([*arguments, "--data", str(data), "--mnli-model", str(tmp_path / "none")]) == 1
    assert f"{tmp_path / 'none'}: no such folder" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_score_of_mnli_is_the_mean_of_both_sets():
    metrics = {"dev_matched": {"score": 0.5}, "dev_mismatched": {"score": 0.75}, "ax": {"score": 0.0}}
    assert task_score("mnli", {"metrics": metrics}) == 0.625


def test_mnli_comes_first_where_others_start_from_it(encoder, tmp_path):
    run = FinetuneConfig(model=encoder, out=tmp_path, seeds=(0, 1))
    config = GlueSuiteConfig(data=tmp_path, tasks=("rte", "cola", "mnli"), from_mnli=True, run=run)
    found = [(run.task, run.run.seed, run.run.model) for run in planned(config)]
    assert found[:2] == [("mnli", 0, encoder), ("mnli", 1, encoder)]
    assert found[2:4] == [("rte", seed, tmp_path / "mnli" / f"seed-{seed}" / "model") for seed in (0, 1)]
    assert found[4:] == [("cola", 0, encoder), ("cola", 1, encoder)]


def test_another_tasks_head_is_not_taken_over(finetuned):
    """Of a model with as many classes, but others, the encoder and the pooler are taken, and of its own task all."""
    task = glue_task("rte", 32)
    config = FinetuneConfig(model=finetuned / "model", out=Path("runs/x"))
    loaded = load_model(config, task, Progress(shown=False))
    before = models.load(finetuned / "model").params
    assert np.array_equal(loaded.params["encoder"]["pooler"]["kernel"], before["encoder"]["pooler"]["kernel"])
    assert not np.array_equal(loaded.params["classifier"]["kernel"], before["classifier"]["kernel"])
    same = load_model(config, glue_task("sst2", 32), Progress(shown=False))
    assert np.array_equal(same.params["classifier"]["kernel"], before["classifier"]["kernel"])


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_by_their_formulas():
    draw = np.random.default_rng(0)
    labels, found = draw.integers(0, 2, 200), draw.integers(0, 2, 200)
    both, neither = ((labels == 1) & (found == 1)).sum(), ((labels == 0) & (found == 0)).sum()
    wrong, missed = ((labels == 0) & (found == 1)).sum(), ((labels == 1) & (found == 0)).sum()
    scores = scored(GLUE["mrpc"].metrics, found, labels)
    assert scores["accuracy"] == pytest.approx((both + neither) / 200)
    assert scores["f1"] == pytest.approx(2 * both / (2 * both + wrong + missed))
    assert scores["score"] == pytest.approx((scores["accuracy"] + scores["f1"]) / 2)
    root = math.sqrt(float((both + wrong) * (both + missed)) * float((neither + wrong) * (neither + missed)))
    assert metric("matthews", found, labels) == pytest.approx((both * neither - wrong * missed) / root)
    values, targets = draw.normal(size=50), draw.normal(size=50).round(1)
    scores = scored(GLUE["stsb"].metrics, values, targets)
    assert scores["pearson"] == pytest.approx(np.corrcoef(values, targets)[0, 1])

    def ranks(of: np.ndarray) -> np.ndarray:
        return np.array([(of < one).sum() + ((of == one).sum() + 1) / 2 for one in of])

    assert scores["spearman"] == pytest.approx(np.corrcoef(ranks(values), ranks(targets))[0, 1])


def test_a_model_that_says_always_the_same_scores_zero():
    labels = np.array([0, 1, 1, 0])
    assert scored(GLUE["cola"].metrics, np.ones(4, int), labels)["score"] == 0
    assert scored(GLUE["stsb"].metrics, np.full(4, 2.5), labels.astype(float))["score"] == 0
    assert metric("f1", np.zeros(4, int), labels) == 0
    assert metric("matthews", np.ones(4, int), np.ones(4, int)) == 0
    assert metric("pearson", 1 + 1e-15 * labels, labels.astype(float)) > 0.9, "nearly the same: without a warning"


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(encoder, sst2, tmp_path, capsys):
    """Run a command, expect a refusal before any training, and return what was said."""

    def run(*more: str, data: Path = sst2, model: Path = encoder) -> str:
        out = tmp_path / "refused"
        arguments = ["finetune", "sst2", "--data", str(data), "--model", str(model), "--out", str(out), *FAST, *more]
        try:
            status = main(arguments)
        except SystemExit as exit:  # the command line itself was refused
            status = exit.code
        said = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert status in (1, 2), said
        assert "Traceback" not in said
        assert not out.exists(), "a refused run leaves nothing behind"
        return said

    return run


def test_a_label_that_is_not_in_the_set(refused, sst2, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(sst2, folder)
    with (folder / "dev.tsv").open("a") as dev:
        dev.write("the film\tgreat\n")
    assert "dev.tsv, line 66: the label 'great' is not in the label set ('0', '1')" in refused(data=folder)


def test_an_empty_training_file(refused, sst2, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(sst2, folder)
    (folder / "train.tsv").write_text("sentence\tlabel\n")
    assert "train.tsv: the file is empty" in refused(data=folder)


def test_a_checkpoint_of_another_family(refused, encoder, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(encoder, folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "nonesuch"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "nonesuch is not a family of this version" in refused(model=folder)


def test_a_checkpoint_without_a_tokenizer(refused, encoder, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(encoder, folder)
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    assert "no tokenizer files in this folder" in refused(model=folder)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-length", "100"], "--max-length is 100, beyond the model's 64 positions"),
        (["--freeze-layers", "3"], "--freeze-layers is 3, but the model has 1 layer."),
        (["--layer-decay", "0"], "--layer-decay is 0.0"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--epochs", "0"], "--epochs is 0.0"),
        (["--diagnostic", "ax"], "--diagnostic is for mnli"),
    ],
)
def test_settings_that_make_no_sense(refused, flags, message):
    assert message in refused(*flags)


def test_evaluating_what_is_no_run(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path), "--data", str(tmp_path)]) == 1
    assert "not the folder of a finished fine-tuning run" in capsys.readouterr().err


def test_every_task_of_glue_has_its_command(encoder):
    for name in ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"):
        config = GlueConfig(task=name, data="x", run=FinetuneConfig(model=encoder, out=Path("runs/x")))
        assert glue_task(config.task, 128).name == name
