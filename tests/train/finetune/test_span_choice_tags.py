"""Spans, choices and tags end to end on a tiny model: learnt, scored, written, predicted again, and packed exactly."""

import io
import itertools
import json
import random
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors import safe_open

from bestiary import models
from bestiary.data import load_tokenizer
from bestiary.data.batches import assemble
from bestiary.data.errors import DataError
from bestiary.data.tasks.squad import Answer, Question
from bestiary.data.tasks.tagging import Sentence
from bestiary.models.encoders.bert import Bert, BertConfig
from bestiary.models.heads.crf import CrfWeights
from bestiary.train.cli import main
from bestiary.train.finetune.tasks.squad import SquadTask
from bestiary.train.finetune.tasks.tagging import Tagged, TaggingTask, entity_scores, files_of, split_file

KEYS, TAILS = ("ada", "bob", "cy", "dee"), ("smith", "jones", "brown")
PLAIN = ("the", "film", "was", "a", "story", "of", "two", "men", "and", "one", "house", "in", "town", "who")
TINY = BertConfig(
    vocab_size=32, width=32, layers=1, heads=2, feed_forward=64, positions=64, dropout=0.0, attention_dropout=0.0
)
FAST = ("--learning-rate", "5e-3", "--batch-size", "16", "--log-every", "8")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A tiny encoder, drawn at random, with its tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "##s", *KEYS, *TAILS, *PLAIN]
    (folder / "vocab.txt").write_text("\n".join(pieces + [f"##{n}" for n in range(32 - len(pieces))]) + "\n")
    model = Bert(TINY)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))["params"]
    models.save(folder / "model", model, jax.device_get(params), load_tokenizer(folder / "vocab.txt"))
    return folder / "model"


def run(capsys, *words: str) -> str:
    """The command's output; it must succeed."""
    capsys.readouterr()
    status = main(list(words))
    said = capsys.readouterr()
    assert status == 0, said.err
    return said.out


def refused(capsys, *words: str) -> str:
    assert main(list(words)) == 1
    return capsys.readouterr().err


# Spans


def write_squad(path: Path, count: int, seed: int) -> Path:
    """Who? The name in the text, of one word or two; in every fourth text there is none."""
    draw = random.Random(seed)
    paragraphs = []
    for number in range(count):
        words = draw.choices(PLAIN[:-1], k=draw.randint(8, 40))
        answers = []
        if number % 4:
            at = draw.randrange(len(words))
            words.insert(at, draw.choice(KEYS) + draw.choice(("", *(f" {tail}" for tail in TAILS))))
            answers = [{"text": words[at], "answer_start": len(" ".join([*words[:at], ""]))}]
        entry = {"id": f"q{number}", "question": "who", "answers": answers, "is_impossible": not answers}
        paragraphs.append({"context": " ".join(words), "qas": [entry]})
    path.write_text(json.dumps({"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    return path


WINDOWS = ("--max-length", "24", "--doc-stride", "8", "--max-question", "4", "--max-answer-length", "4")


def test_squad_is_learnt_with_and_without_answers(encoder, tmp_path, capsys):
    train, dev = write_squad(tmp_path / "train.json", 160, 0), write_squad(tmp_path / "dev.json", 40, 1)
    out = tmp_path / "run"
    run(
        capsys, "finetune", "squad", "--data", str(train), "--eval-data", str(dev), "--eval-examples", "24", "--model",
        str(encoder), "--out", str(out), "--epochs", "5", "--evaluate-epochs", "5", *FAST, *WINDOWS,
    )  # fmt: skip
    metrics = json.loads((out / "results.json").read_text())["metrics"]["dev"]
    assert metrics["total"] == 24
    assert metrics["HasAns_f1"] > 80
    assert metrics["NoAns_f1"] > 80
    assert metrics["f1"] == metrics["best_f1"]
    folder = out / "predictions" / "dev"
    predictions, nbest, odds = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("predictions", "nbest_predictions", "null_odds")
    )
    assert predictions.keys() == nbest.keys() == odds.keys()
    threshold = json.loads((out / "task.json").read_text())["null_threshold"]
    assert threshold == metrics["null_threshold"]
    for key, text in predictions.items():
        assert (text == "") == (odds[key] > threshold)
        assert text in [option["text"] for option in nbest[key]]

    said = json.loads(run(capsys, "evaluate", str(out), "--data", str(dev)))
    assert said["examples"] == 40
    assert said["metrics"]["null_threshold"] == threshold
    texts = "the film was of ada smith and two men", "the house in town"
    words = ["--question", "who", "who", "--context", *texts]
    first, second = map(json.loads, run(capsys, "predict", str(out), *words).splitlines())
    assert (first["answer"], first["start"]) == ("ada smith", 16)
    assert second["answer"] == ""
    asked = run(capsys, "predict", str(out), "--input", str(dev), "--out", str(tmp_path / "again"))
    again = json.loads((tmp_path / "again" / "test" / "predictions.json").read_text())
    assert len(again) == len(asked.splitlines()) == 40
    assert {key: again[key] for key in predictions} == predictions


def test_bad_answers_are_refused_before_training(encoder, tmp_path, capsys):
    train = write_squad(tmp_path / "train.json", 8, 0)
    document = json.loads(train.read_text())
    document["data"][0]["paragraphs"][1]["qas"][0]["answers"][0]["answer_start"] += 1
    train.write_text(json.dumps(document))
    command = (
        "finetune", "squad", "--data", str(train), "--eval-data", str(train), "--model", str(encoder),
        "--out", str(tmp_path / "run"), *FAST, *WINDOWS,
    )  # fmt: skip
    said = refused(capsys, *command)
    assert 'question "q1"' in said
    assert str(train) in said
    assert not (tmp_path / "run").exists()
    assert "leave no room for the context" in refused(capsys, *command, "--skip-bad-answers", "--max-question", "22")


def test_an_answer_beyond_the_windows_is_refused_before_training(encoder, tmp_path, capsys):
    context = " ".join(PLAIN * 3)
    entry = {"id": "long", "question": "who", "answers": [{"text": context, "answer_start": 0}]}
    train = tmp_path / "train.json"
    train.write_text(json.dumps({"data": [{"paragraphs": [{"context": context, "qas": [entry]}]}]}))
    command = (
        "finetune", "squad", "--data", str(train), "--eval-data", str(train), "--model", str(encoder),
        "--out", str(tmp_path / "run"), "--steps", "1", *FAST, *WINDOWS,
    )  # fmt: skip
    said = refused(capsys, *command)
    assert "1 of 1 training questions have an answer that no window contains" in said
    assert 'question "long"' in said
    assert not (tmp_path / "run").exists()


def squad_task() -> SquadTask:
    return SquadTask("squad", 24, 8, 4, 4, 5, None, False)


def packed(task, features, rows: list[list[int]], length: int = 48) -> dict[str, jax.Array]:
    """The features in the rows as given."""
    units = np.array([unit for row in rows for unit in row])
    row_of = np.array([number for number, row in enumerate(rows) for _ in row])
    slots = max(map(len, rows)) * features.unit_size
    placed = assemble(features, units, row_of, range(len(rows)), length=length, slots=slots, pad_id=0)
    return {name: jnp.asarray(values) for name, values in placed.batch.items()}


def value(task, model, params, batch) -> float:
    @jax.jit
    def loss(params):
        total, weight = task.loss(task.forward(model, params, batch, deterministic=True), batch)["loss"]
        return total / weight

    return float(loss(params))


def test_packed_windows_give_the_loss_of_each_alone(encoder):
    task = squad_task()
    loaded = models.load(encoder, head="span")
    context = " ".join(PLAIN[:12])
    asked = [Question(str(n), "who was", context[n:], (Answer(context[n + 4 : n + 9], 4),)) for n in (0, 9, 18)]
    features = task.encode(loaded.tokenizer, asked)
    assert features.count == 3
    together = value(task, loaded.model, loaded.params, packed(task, features, [[1, 0], [2]]))
    apart = value(task, loaded.model, loaded.params, packed(task, features, [[0], [1], [2]], 24))
    assert together == pytest.approx(apart, abs=1e-5)


# Choices


def choice_rows(count: int, seed: int) -> list[tuple[str, list[str], int]]:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        label = draw.randrange(4)
        endings = [" ".join(draw.choices(PLAIN, k=draw.randint(2, 5))) for _ in range(4)]
        endings[label] += f" {draw.choice(KEYS)}"
        rows.append((" ".join(draw.choices(PLAIN, k=4)), endings, label))
    return rows


def test_swag_is_learnt_and_predicted(encoder, tmp_path, capsys):
    folder, out = tmp_path / "swag", tmp_path / "run"
    folder.mkdir()
    header = "video-id,fold-ind,startphrase,sent1,sent2,gold-source,ending0,ending1,ending2,ending3"
    for name, count, seed in (("train", 96, 0), ("val", 32, 1), ("test", 8, 2)):
        labelled = name != "test"
        lines = [f",{header}{',label' * labelled}"]
        for number, (text, endings, label) in enumerate(choice_rows(count, seed)):
            lines.append(",".join([f"{number},v,0,x,{text},,gold", *endings, *[str(label)] * labelled]))
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    run(
        capsys, "finetune", "swag", "--data", str(folder), "--model", str(encoder), "--out", str(out), "--epochs", "6",
        "--evaluate-epochs", "6", "--max-length", "16", *FAST,
    )  # fmt: skip
    assert json.loads((out / "results.json").read_text())["metrics"]["dev"]["accuracy"] > 0.9
    chosen = (out / "predictions" / "test.csv").read_text().splitlines()
    assert chosen[0] == "pred"
    right = [int(line) == label for line, (_, _, label) in zip(chosen[1:], choice_rows(8, 2), strict=True)]
    assert sum(right) >= 6
    words = ["--text", "the film", "--endings", "was a story", "of two men", "and bob", "in town"]
    said = json.loads(run(capsys, "predict", str(out), *words))
    assert (said["choice"], said["ending"]) == (2, "and bob")
    assert sum(said["probabilities"]) == pytest.approx(1)
    assert "4 --endings for each" in refused(capsys, "predict", str(out), *words[:-1])


# Tags


def write_conll(path: Path, count: int, seed: int) -> Path:
    """Names are entities: of one word or two, with the second going on."""
    draw = random.Random(seed)
    blocks = []
    for _ in range(count):
        lines = []
        for word in draw.choices(PLAIN, k=draw.randint(4, 10)):
            lines.append(f"{word}\tO")
            if draw.random() < 0.3:
                name = draw.choice(KEYS)
                kind = "per" if name in KEYS[:2] else "loc"
                lines.append(f"{name}s\tB-{kind}")  # two pieces
                lines += [f"{draw.choice(TAILS)}\tI-{kind}"] * (draw.random() < 0.5)
        blocks.append("\n".join(lines))
    path.write_text("\n\t\n".join(blocks) + "\n")
    return path


def test_entities_are_learnt_with_a_crf(encoder, tmp_path, capsys, monkeypatch):
    folder, out = tmp_path / "ner", tmp_path / "run"
    folder.mkdir()
    for seed, (name, count) in enumerate((("train", 128), ("dev", 32), ("test", 16))):
        write_conll(folder / f"{name}.conll", count, seed)
    command = ("finetune", "ner", "--data", str(folder), "--model", str(encoder), "--crf", "--max-length", "16", *FAST)
    run(capsys, *command, "--out", str(out), "--epochs", "6", "--evaluate-epochs", "6", "--crf-rate", "3")
    results = json.loads((out / "results.json").read_text())["metrics"]
    assert results["dev"]["f1"] > 0.9
    assert results["test"]["f1_per"] > 0.8
    with safe_open(out / "model" / "model.safetensors", "np") as tensors:
        names = set(tensors.keys())
        assert np.abs(tensors.get_tensor("crf.transitions")).max() > 0.1, "the chain has learnt something"
    assert {"classifier.weight", "crf.start_transitions", "crf.end_transitions"} <= names
    stored = json.loads((out / "model" / "config.json").read_text())
    assert list(stored["id2label"].values()) == ["O", "B-loc", "I-loc", "B-per", "I-per"]
    # Every word is there with its own and the predicted tag; no tag is illegal.
    written = (out / "predictions" / "test.conll").read_text().splitlines()
    given = [line for line in (folder / "test.conll").read_text().splitlines() if line.strip()]
    assert [line.rpartition("\t")[0] for line in written if line] == given
    said = json.loads(run(capsys, "predict", str(out), "--text", "the house of adas smith in dees town"))
    assert said["words"] == ["the", "house", "of", "adas", "smith", "in", "dees", "town"]
    assert said["tags"] == ["O", "O", "O", "B-per", "I-per", "O", "B-loc", "O"]
    one, other = said["entities"]
    assert (one["type"], one["words"], one["start"], one["end"], one["text"]) == ("per", [3, 5], 13, 23, "adas smith")
    assert (other["type"], other["text"]) == ("loc", "dees")
    assert one["probability"] == min(said["probabilities"][3:5])
    assert all(0.5 < share <= 1 for share in said["probabilities"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"adas smith\n\nthe house\n")))
    lines = [json.loads(line) for line in run(capsys, "predict", str(out)).splitlines()]
    assert [[entity["text"] for entity in line["entities"]] for line in lines] == [["adas smith"], [], []]
    assert [line["words"] for line in lines] == [["adas", "smith"], [], ["the", "house"]]

    report = json.loads((out / "report" / "test.json").read_text())
    assert np.sum(report["confusion"]["counts"]) == len(given)
    assert report["entities"]["per"]["f1"] == results["test"]["f1_per"]
    assert sum(kind["support"] for kind in report["entities"].values()) == sum("\tB-" in line for line in given)
    assert {file.name for file in (out / "report").iterdir()} == {
        f"{split}.{ending}" for split in ("dev", "test") for ending in ("json", "txt", "png")
    }

    (folder / "dev.conll").write_text("the\tO\nadas\tB-org\n")
    said = refused(capsys, *command, "--out", str(tmp_path / "other"))
    assert "dev.conll, line 2: the tag 'B-org' is not among those trained on" in said
    (folder / "train.conll").write_text("the\tO\nadas\tI-per\n")
    assert "train.conll, line 2: I-per after O" in refused(capsys, *command, "--out", str(tmp_path / "other"))


def test_files_of_a_folder_by_their_splits(tmp_path):
    names = ("eng.train", "eng.testa", "latest_notes.txt", "en_ewt-ud-dev.conllu")
    for name in names:
        (tmp_path / name).touch()
    kinds = (".txt", ".conllu")
    assert files_of(tmp_path, "test", kinds) == [], "neither testa, which is for development, nor latest"
    assert split_file(tmp_path, "train", kinds) == tmp_path / "eng.train"
    with pytest.raises(DataError, match=r"found en_ewt-ud-dev.conllu, eng.testa"):
        split_file(tmp_path, "dev", kinds)
    (tmp_path / "eng.testb").touch()
    assert split_file(tmp_path, "test", kinds) == tmp_path / "eng.testb"


def tagging_task(**changes) -> TaggingTask:
    settings = dict(
        name="ner", max_length=24, labels=("O", "B-x", "I-x"), crf=True, crf_rate=1.0, legal=True, scheme="iob2",
        repair=False, word_column=0, tag_column=-1, column="upos",
    )  # fmt: skip
    return TaggingTask(**{**settings, **changes})


@pytest.mark.parametrize("crf", [False, True])
def test_packed_sentences_give_the_loss_of_each_alone(encoder, crf):
    task = tagging_task(crf=crf)
    loaded = models.load(encoder, head=task.head, **task.model_changes())
    if crf:
        draw = np.random.default_rng(0)
        loaded.params["crf"] = {
            name: draw.normal(size=weights.shape).astype(np.float32) for name, weights in loaded.params["crf"].items()
        }
    sentences = [
        Sentence(("adas", "smith", "in", "town"), ("B-x", "I-x", "O", "O"), "f", (1, 2, 3, 4)),
        Sentence(("house",), ("B-x",), "f", (6,)),
        Sentence(("two", "men", "bobs"), ("O", "O", "B-x"), "f", (8, 9, 10)),
    ]
    features = task.encode(loaded.tokenizer, sentences)
    together = value(task, loaded.model, loaded.params, packed(task, features, [[1, 2, 0]]))
    apart = value(task, loaded.model, loaded.params, packed(task, features, [[0], [1], [2]], 16))
    assert together == pytest.approx(apart, abs=1e-5)


def test_a_sentence_cut_inside_of_an_entity_is_no_impossible_chain(encoder):
    task = tagging_task(max_length=6)
    loaded = models.load(encoder, head="crf", **task.model_changes())
    sentence = Sentence(("ada", *["smith"] * 6), ("B-x", *["I-x"] * 6), "f", tuple(range(7)))
    features = task.encode(loaded.tokenizer, [sentence])
    assert features.count == 2
    assert features.note == "1 sentence in several pieces"
    assert value(task, loaded.model, loaded.params, packed(task, features, [[0], [1]], 8)) < 10


@pytest.mark.parametrize("crf", [False, True])
def test_a_tag_has_its_probability_among_all_sequences(crf):
    """Against the sum over all sequences of a sentence; another sentence in the row changes nothing."""
    draw = np.random.default_rng(0)
    task = tagging_task(crf=crf, legal=False)
    logits = draw.normal(size=(1, 6, 3)).astype(np.float32)
    start, end, steps = (draw.normal(size=shape).astype(np.float32) for shape in ((3,), (3,), (3, 3)))
    segments, tagged = np.array([[1, 1, 1, 1, 2, 2]], np.int32), np.array([[1, 0, 1, 1, 1, 1]], np.float32)
    weights = CrfWeights(*map(jnp.asarray, (start, steps, end))) if crf else None
    batch = {"segment_ids": jnp.asarray(segments), "label_weights": jnp.asarray(tagged)}
    collected = task.select(Tagged(jnp.asarray(logits), weights), batch).token
    words = [0, 2, 3]
    scores = {}
    for tags in itertools.product(range(3), repeat=3):
        score = sum(logits[0, word, tag] for word, tag in zip(words, tags, strict=True))
        if crf:
            score += start[tags[0]] + steps[tags[0], tags[1]] + steps[tags[1], tags[2]] + end[tags[2]]
        scores[tags] = np.exp(score)
    best = max(scores, key=lambda tags: scores[tags])
    assert tuple(np.asarray(collected["tags"])[0, words]) == best
    for place, tag in enumerate(best):
        share = sum(value for tags, value in scores.items() if tags[place] == tag) / sum(scores.values())
        assert float(collected["probabilities"][0, words[place]]) == pytest.approx(share, abs=1e-5)


def test_a_test_file_may_have_no_tags(tmp_path):
    (tmp_path / "test.conll").write_text("the\nadas\n")
    task = tagging_task(crf=False)
    (sentence,) = task.read_test(tmp_path, columns=2)
    assert (sentence.words, sentence.tags) == (("the", "adas"), None)
    (tmp_path / "test.conll").write_text("the\tO\nadas\tB-y\n")
    with pytest.raises(DataError, match="line 2: the tag 'B-y' is not among those trained on"):
        task.read_test(tmp_path, columns=2)


def test_entities_are_counted_as_conlleval_does():
    wanted = [["B-x", "I-x", "O", "B-y"], ["O", "B-x"]]
    found = entity_scores(wanted, [["B-x", "O", "O", "B-y"], ["I-x", "I-x"]])
    # Found are x of one word (too short), y, and x of two words (too long); an I-x that begins is read as an entity.
    assert found == {"precision": 1 / 3, "recall": 1 / 3, "f1": 1 / 3, "f1_x": 0.0, "f1_y": 1.0}
    assert entity_scores([["O"]], [["O"]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert entity_scores([["O"]], [["B-x"]])["precision"] == 0.0
