"""Training a translator, translating with it, scoring it: small models on made-up words."""

import dataclasses
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from bestiary import models
from bestiary.data.tokenizers.pairs import TextForm
from bestiary.models.encoder_decoders.transformer import TransformerConfig
from bestiary.train.cli import main as cli
from bestiary.train.config import LoopConfig, OptimConfig
from bestiary.train.errors import RunError
from bestiary.train.generate.config import DecodeConfig
from bestiary.train.generate.lines import Lines
from bestiary.train.learner import TrainState, ema_or_params
from bestiary.train.loop import RESTART, Stop
from bestiary.train.optim.optimizer import running_mean
from bestiary.train.optim.schedule import schedule
from bestiary.train.run import start_run
from bestiary.train.translate.config import FREE, TranslateConfig, upgrade
from bestiary.train.translate.run import RunConfig
from bestiary.train.translate.score import bleu_language, corpus_scores
from bestiary.train.translate.train import Means, translate
from bestiary.train.translate.translator import Translator, open_translator

NUMBERS = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "fünf", "six": "sechs"}
MAIN = "from bestiary.train.cli import main; raise SystemExit(main())"
STEPS = 12


def made_up_pairs(count: int, seed: int) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    lines = [draw.choices(list(NUMBERS), k=draw.randint(1, 6)) for _ in range(count)]
    return [(" ".join(words), " ".join(NUMBERS[word] for word in words)) for words in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of pairs to train on and to test with."""
    folder = tmp_path_factory.mktemp("translate")
    for name, count in (("train", 400), ("dev", 20)):
        pairs = made_up_pairs(count, count)
        (folder / f"{name}.en").write_text("".join(f"{source}\n" for source, _ in pairs))
        (folder / f"{name}.de").write_text("".join(f"{target}\n" for _, target in pairs))
    return folder


@pytest.fixture(scope="module", autouse=True)
def small_model() -> Any:
    """The preset of the tests is smaller than the smallest that is offered."""
    patch = pytest.MonkeyPatch()
    whole = TransformerConfig.preset

    def preset(name: str, **changes: Any) -> TransformerConfig:
        sizes = dict(width=32, encoder_layers=2, decoder_layers=2, encoder_heads=2, decoder_heads=2)
        return whole(name, **sizes, encoder_feed_forward=64, decoder_feed_forward=64, **changes)

    patch.setattr(TransformerConfig, "preset", preset)
    yield
    patch.undo()


def make_config(folder: Path, out: str, **changes: Any) -> TranslateConfig:
    settings = dict(
        source=folder / "train.en",
        target=folder / "train.de",
        dev=(str(folder / "dev.en"), str(folder / "dev.de")),
        vocab_size=60,
        row_tokens=32,
        batch_tokens=512,
        steps=STEPS,
        accumulate=2,
        dropout=0.1,
        r_drop=0.5,
        sample_subwords=0.2,
        final_beam=1,
        optim=OptimConfig(learning_rate=3e-3, warmup=4, schedule="inverse_sqrt", weight_decay=0.0, beta2=0.98, ema=0.5),
        loop=LoopConfig(log_every=3, evaluate_every=4, checkpoint_every=5),
        cache=folder / "cache",
        out=folder / out,
    )
    return TranslateConfig(**(settings | changes))  # pyright: ignore


class StopAfter(Stop):
    """As if a signal came during a step."""

    def __init__(self, step: int):
        super().__init__()
        self.step = step

    def agreed(self, step: int) -> bool:
        if step == self.step:
            self.signal = 15
        return step == self.step


def train(config: TranslateConfig, stop: Stop | None = None) -> int:
    """What the command does."""
    with start_run(config, FREE, upgrade=upgrade, stop=stop) as run:
        return translate(run, config)


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """The folder of a run that nothing disturbed: with R-Drop, sampled pieces, a running mean and batches in parts."""
    config = make_config(folder, "whole")
    assert train(config) == 0
    return config.out


def test_the_run_folder_is_whole(trained: Path):
    results = json.loads((trained / "results.json").read_text())
    assert results["steps"] == STEPS
    assert {"bleu", "chrf", "tokenised_bleu", "bleu_signature"} <= set(results["held_out"])
    assert {"config.json", "model.safetensors", "subwords.json", "source.spm", "vocab.json"} <= {
        path.name for path in (trained / "model").iterdir()
    }
    model = models.load(trained / "model")  # as Marian: padding is last, outputs start from its zero vector
    c, words = model.config, json.loads((trained / "model" / "vocab.json").read_text())
    assert c.pad_token_id == c.decoder_start_token_id == words["<pad>"] == len(words) - 1
    assert (c.eos_token_id, c.bos_token_id) == (words["</s>"], words["<s>"])
    assert not model.params["source"]["embedding"][-1].any()
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "eval/bleu" in record] == [4, 8, 12]
    training = [record for record in records if "loss" in record]
    assert training[-1]["loss"] < training[0]["loss"]
    assert all(record["divergence"] > 0 for record in training)


def test_a_resumed_run_equals_the_uninterrupted_one(folder: Path, trained: Path):
    config = make_config(folder, "stopped")
    assert train(config, StopAfter(7)) == RESTART
    assert not (config.out / "results.json").exists()
    assert train(config) == 0
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (config.out / name).read_bytes() == (trained / name).read_bytes()


def test_a_finished_run_is_left_alone(folder: Path, trained: Path, capsys: pytest.CaptureFixture[str]):
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.name != "run.lock"}

    before = times()
    assert train(make_config(folder, trained.name)) == 0
    assert "holds the finished run" in capsys.readouterr().err
    assert times() == before


def test_an_early_end_and_separate_vocabularies(folder: Path):
    config = make_config(
        folder,
        "flags",
        subwords="bpe",
        joint=False,
        vocab_size=40,
        accumulate=1,
        r_drop=0.0,
        sample_subwords=0.0,
        average=2,
        patience=1,
        optim=OptimConfig(learning_rate=1e-9, warmup=2, schedule="inverse_sqrt", weight_decay=0.0),
        loop=LoopConfig(evaluate_every=2),
    )
    assert train(config) == 0
    results = json.loads((config.out / "results.json").read_text())
    assert results["steps"] == 4  # the second evaluation was no better than the first
    assert results["best"]["step"] == 2
    assert results["mean_of_steps"] == [2, 4]


def test_a_dev_source_longer_than_the_model_takes_is_translated_in_parts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for side, word in (("en", "one "), ("de", "eins ")):
        (tmp_path / f"dev.{side}").write_text((folder / f"dev.{side}").read_text() + word * 600 + "\n")
    config = make_config(folder, "long", dev=(str(tmp_path / "dev.en"), str(tmp_path / "dev.de")), steps=4)
    assert train(config) == 0
    assert "dev: 1 pair is too long for a row" in capsys.readouterr().err
    assert json.loads((config.out / "results.json").read_text())["steps"] == 4


def test_the_inverse_square_root_of_the_step():
    config = OptimConfig(learning_rate=0.5, warmup=100, schedule="inverse_sqrt")
    rate = schedule(config, [(1000, None)])
    steps = np.array([0, 49, 99, 100, 399, 999])
    paper = 0.5 * 10 * np.minimum((steps + 1) ** -0.5, (steps + 1) * 100**-1.5)
    np.testing.assert_allclose([float(rate(int(step))) for step in steps], paper, rtol=1e-5)


def test_a_running_mean_follows_the_parameters():
    transform = optax.chain(optax.sgd(1.0), running_mean(0.75))
    params = {"kernel": jax.numpy.array([4.0])}
    state = transform.init(params)
    for _ in range(2):
        updates, state = transform.update({"kernel": jax.numpy.array([2.0])}, state, params)
        params = optax.apply_updates(params, updates)
    mean = optax.tree.get(state, "running_mean")
    assert mean["kernel"].tolist() == [0.75 * (0.75 * 4 + 0.25 * 2) + 0.25 * 0]


def test_defaults_follow_the_text_and_the_size(monkeypatch: pytest.MonkeyPatch):
    seen: list[TranslateConfig] = []
    monkeypatch.setattr("bestiary.train.translate.train.main", lambda config: seen.append(config) or 0)
    text = ["--source", "a", "--target", "b"]
    for arguments in ([], text, [*text, "--steps", "7"], ["--pairs", "p.tsv", "--preset=transformer-base"]):
        assert cli(["translate", "train", *arguments]) == 0
    phrases, tiny, fewer, base = seen
    assert phrases == TranslateConfig()
    assert (tiny.steps, tiny.batch_tokens, tiny.dropout, tiny.optim.learning_rate) == (8000, 8192, 0.3, 5e-3)
    assert dataclasses.replace(fewer, steps=8000) == tiny
    assert fewer.steps == 7
    assert (base.steps, base.optim.learning_rate, base.optim.warmup, base.vocab_size) == (100_000, 7e-4, 4000, 37_000)


def test_a_running_mean_is_what_is_evaluated():
    mean = running_mean(0.5).init({"kernel": jax.numpy.array([1.0]), "frozen": None})
    state = TrainState(
        jax.numpy.int32(0), {"kernel": jax.numpy.array([3.0]), "frozen": jax.numpy.array([5.0])}, (mean,), None
    )  # pyright: ignore
    found = {name: leaf.tolist() for name, leaf in ema_or_params(state).items()}
    assert found == {"kernel": [1.0], "frozen": [5.0]}
    assert ema_or_params(state.replace(opt_state=()))["kernel"].tolist() == [3.0]


def test_means_keep_the_last_or_the_best(tmp_path: Path, folder: Path):
    for of, expected in (("last", [3, 4]), ("best", [2, 4])):
        config = make_config(folder, "unused", average=2, average_of=of, optim=OptimConfig())
        means = Means(tmp_path / of, config)
        (tmp_path / of).mkdir()
        for step, figure in ((1, -0.5), (2, 0.9), (3, -0.2), (4, 0.5)):  # a correlation may be negative
            means(step, {"a": {"b": np.full(3, float(step), np.float32)}}, figure)
        assert len(list((tmp_path / of / "weights").iterdir())) == 2
        mean, steps = means.mean()
        assert steps == expected
        assert mean["a"]["b"].tolist() == [sum(expected) / 2] * 3


def test_a_run_whose_decoder_starts_otherwise_is_named():
    stored = {"out": "runs/old", "optim": {}, "init_from": None}
    with pytest.raises(RunError, match="runs/old was begun by an earlier version, whose decoder starts from another"):
        upgrade(stored)
    assert upgrade(stored | {"init_from": "marian"})["init_from"] == "marian"  # its config says what it starts from


# --- translating ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def translator(trained: Path) -> Translator:
    return open_translator(trained, DecodeConfig(beam=2, max_length=16), rows=4)


def test_lines_keep_their_order_and_empty_ones_stay(translator: Translator):
    lines = ["one two three", "", "four", "  ", "two one", "six six six five one"]
    together = [found[0].text for found in translator.translate(lines)]
    assert together == [translator.translate([line])[0][0].text for line in lines]
    assert together[1] == together[3] == ""
    compiled = translator.generator.compilations
    translator.translate(["five", "six two"])
    assert translator.generator.compilations == compiled


def test_a_checkpoints_own_settings_are_followed(trained: Path, tmp_path: Path):
    shutil.copytree(trained / "model", tmp_path, dirs_exist_ok=True)
    settings = {"max_length": 3, "num_beams": 2, "num_return_sequences": 2, "eos_token_id": 5}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    translator = open_translator(tmp_path, None, rows=4)
    assert (translator.decode.beam, translator.decode.max_length, translator.model.config.eos_token_id) == (2, 2, 5)
    assert [len(answers) for answers in translator.translate(["one two", ""])] == [2, 2]
    with pytest.raises(RunError, match="leave one out"):
        RunConfig(tmp_path, DecodeConfig(beam=4), generation_config=True)


def test_control_characters_count_as_spaces(translator: Translator):
    before = translator.lines
    found = translator.translate(["one\x00two\u2028three"])
    assert found[0][0].text == translator.translate(["one two three"])[0][0].text
    assert f"1 line with control characters, taken for spaces: {before + 1}" in list(translator.findings)


def test_what_is_drawn_depends_on_a_lines_number_alone(trained: Path):
    lines = ["one two three"] * 6
    decode = DecodeConfig(sample=True, max_length=16, seed=3)
    found = []
    for window, rows in ((6, 4), (1, 4), (4, 8)):
        translator = open_translator(trained, decode, rows=rows)
        parts = [lines[i : i + window] for i in range(0, 6, window)]
        found.append([answer[0].text for part in parts for answer in translator.translate(part)])
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) > 1


def test_long_lines_are_parted_or_refused(trained: Path):
    line = "one two three four five six one " * 4
    for too_long, limit in (("split", 12), ("refuse", 12), ("split", 512)):
        decode = DecodeConfig(beam=1, max_length=16)
        translator = open_translator(trained, decode, rows=4, longest=limit, too_long=too_long)  # pyright: ignore
        if too_long == "refuse":
            with pytest.raises(RunError, match=r"line 1: .* more than 12"):
                translator.translate([line])
            answers = translator.answers(["one two", "three", line, "four"])
            assert len([next(answers), next(answers)]) == 2
            with pytest.raises(RunError, match=r"line 3: .* more than 12"):
                next(answers)
            continue
        parts = translator._parts(line.strip(), 1)
        assert all(len(part) <= limit for part in parts)
        said = " ".join(translator.tokenizer.source.decode(part) for part in parts)
        assert said.replace(" ", "") == line.replace(" ", "")
        assert (len(parts) > 1) == (limit == 12)
        assert bool(list(translator.findings)) == (limit == 12)
    # Unasked, what was never longer in training is not here either.
    assert open_translator(trained, DecodeConfig(max_length=16), rows=4).longest == make_config(trained, "").row_tokens


class Dripping(io.RawIOBase):
    """A stream whose lines come one by one."""

    def __init__(self, lines: list[bytes], wait: float):
        self.lines, self.wait, self.given = lines, wait, 0

    def __iter__(self):
        for line in self.lines:
            self.given += 1
            yield line
            time.sleep(self.wait)


def test_lines_are_taken_as_they_come():
    slow = Lines(Dripping([b"a\n", b"b\r\n", b"c"], 0.2), 10)  # pyright: ignore
    assert list(slow) == [["a"], ["b"], ["c"]]
    fast = Lines(io.BytesIO(b"\xef\xbb\xbfx\n" + b"y\n" * 24), 10)  # pyright: ignore
    assert [len(some) for some in fast] == [10, 10, 5]
    endless = Dripping([b"z\n"] * 100_000, 0.0)
    first = next(iter(Lines(endless, 10)))  # pyright: ignore
    assert len(first) == 10
    assert endless.given <= 30  # no more is read than can wait


def test_a_line_that_is_not_utf8_is_named_after_those_before_it():
    lines = iter(Lines(io.BytesIO(b"a\nb\nc\xff\n"), 10))  # pyright: ignore
    assert next(lines) == ["a", "b"]
    with pytest.raises(RunError, match=r"line 3: not UTF-8 \(byte 0xff at column 2\)"):
        next(lines)


@pytest.fixture
def command() -> Callable[..., subprocess.Popen[bytes]]:
    """Starts `bestiary`."""

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [sys.executable, "-c", MAIN, *arguments], env=environment, stdin=pipe, stdout=pipe, stderr=pipe
        )

    return start


def test_the_command_answers_each_line_and_draws_attention(command: Any, trained: Path, tmp_path: Path):
    drawn = tmp_path / "map.html"
    flags = ["--beam", "1", "--max-length", "16", "--batch", "4", "--attention", str(drawn), "--layers", "1", "2"]
    process = command("translate", "run", "--model", str(trained), *flags)
    process.stdin.write(b"one two\n\nthree\n")
    process.stdin.flush()
    answers = [process.stdout.readline() for _ in range(3)]  # before the input ends
    rest, said = process.communicate(timeout=120)
    assert process.returncode == 0, said.decode()
    assert answers[1] == b"\n"
    assert rest == b""
    page = drawn.read_text()
    assert page.count("<table>") == 2 * 2 * 3  # sentences, layers, the mean and two heads
    assert "layer 2, head 1" in page


def test_the_command_ends_quietly_when_its_reader_leaves(command: Any, trained: Path):
    process = command("translate", "run", "--model", str(trained), "--beam", "1", "--max-length", "16", "--batch", "4")
    process.stdout.close()
    process.stdin.write(b"one two\n" * 200)
    process.stdin.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 141, said.decode()
    assert b"Traceback" not in said


# --- scoring ----------------------------------------------------------------------------------------------------------


def test_scores_are_sacrebleus_and_multi_bleus():
    from sacrebleu import corpus_bleu, corpus_chrf

    references = ["Der Hund läuft über die Wiese .", "Ein Mann schläft auf dem Sofa im Zimmer ."]
    translations = ["der Hund rennt über die Wiese .", "Ein Mann schläft auf dem Sofa ."]
    found = corpus_scores(translations, references, TextForm())
    assert found.values["bleu"] == corpus_bleu(translations, [references]).score
    assert found.values["chrf"] == corpus_chrf(translations, [references]).score
    assert found.values["bleu_lowercase"] > found.values["bleu"]
    assert "tok:13a" in found.signatures["bleu_signature"]
    # multi-bleu.perl of these lines, by hand: 12, 8, 6, 4 of 14, 12, 10, 8 n-grams; 14 words for 16
    expected = 100 * np.exp(1 - 16 / 14 + np.log([12 / 14, 8 / 12, 6 / 10, 4 / 8]).mean())
    lower = 100 * np.exp(1 - 16 / 14 + np.log([13 / 14, 9 / 12, 6 / 10, 4 / 8]).mean())
    joined = [[text.replace(" .", ".") for text in texts] for texts in (translations, references)]
    for texts in ((translations, references), joined):  # Moses parts the full stop, if it is not parted
        found = corpus_scores(*texts, TextForm())
        np.testing.assert_allclose(found.values["tokenised_bleu"], expected, rtol=1e-9)
        np.testing.assert_allclose(found.values["tokenised_bleu_lowercase"], lower, rtol=1e-9)
        assert "hyp_len=14, ref_len=16" in found.details["tokenised_bleu"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hypothesis", "h", "--beam", "5"], "--hypothesis is translated already: leave --beam out"),
        (["--hypothesis", "h", "--no-sample"], "leave --sample out"),
        (["--hypothesis", "h", "--batch=64"], "leave --batch out"),
        (["--hypothesis", "h", "--language", "zz"], "--language zz: expected an ISO 639-1 code"),
        (["--model", "m", "--source", "s", "--language", "de"], "--language is for --hypothesis"),
        (["--model", "m", "--source", "s", "--generation-config", "--max_length", "256"], "leave --max-length out"),
    ],
)
def test_what_would_be_ignored_is_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    """Also where a flag repeats its default."""
    assert cli(["translate", "score", "--reference", "r", *flags]) == 1
    assert message in capsys.readouterr().err


def test_chinese_is_scored_by_characters():
    references = ["狗在草地上奔跑。", "一个男人在沙发上睡觉。"]
    translations = ["狗在草地上跑。", "一个男人睡在沙发上。"]
    found = corpus_scores(translations, references, TextForm(("en", "zh")))
    assert "tok:zh" in found.signatures["bleu_signature"]
    assert found.values["bleu"] > 30 > corpus_scores(translations, references, TextForm()).values["bleu"]
    assert [bleu_language(name) for name in ("zh_TW", "zho_Hans", "cmn", "de")] == ["zh", "zh", "zh", "de"]
    with pytest.raises(RunError, match=r"pip install 'sacrebleu\[ja\]'"):
        bleu_language("ja")


def test_bad_input_is_refused_before_any_work(folder: Path, trained: Path, tmp_path: Path):
    (tmp_path / "short.de").write_text("eins\n")
    with pytest.raises(ValueError, match=r"400 lines .* 1:"):
        train(make_config(folder, "bad", target=tmp_path / "short.de"))
    with pytest.raises(RunError, match="longer than rows of 8 and 8 tokens"):
        train(make_config(folder, "bad", row_tokens=8, too_long="refuse", vocab_size=22))
    first = next((folder / "cache" / "translation" / "tokenizers").iterdir())  # with padding first
    with pytest.raises(RunError, match=r"other ids than those of|vocabulary of"):
        train(make_config(folder, "bad", init_from=trained / "model", tokenizer=first))
    with pytest.raises(RunError, match="belong together"):
        make_config(folder, "bad", target=None)
    with pytest.raises(RunError, match="text of your own"):
        make_config(folder, "bad", source=None, target=None)
    with pytest.raises(RunError, match="transformer-huge: there is no such size"):
        make_config(folder, "bad", preset="transformer-huge")
    with pytest.raises(RunError, match="no folder"):
        RunConfig(trained, attention=tmp_path / "none" / "map.html")
    with pytest.raises(RunError, match="give it a file"):
        RunConfig(trained, layers=(1,))
    with pytest.raises(RunError, match="joint"):
        make_config(folder, "bad", joint=False, tying="all")
    with pytest.raises(RunError, match="--r-drop"):
        make_config(folder, "bad", dropout=0.0)
    assert not (folder / "bad").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--beam", "0"], "beam: expected at least 1, found 0"),
        (["--n-best", "3"], "n_best: expected at most beam"),
        (["--sample", "--beam", "2"], "beam must be 1"),
        (
            ["--coverage-penalty", "0.2"],
            "coverage_penalty and early_stopping are for beam search; they need beam above 1",
        ),
        (["--seed", "3"], "nothing is random without sample"),
        (["--generation-config"], "--generation-config replaces the flags of decoding: leave --beam out"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert cli(["translate", "run", "--model", "nowhere", "--beam", "1", *flags]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bestiary: ")
    assert message in line


def test_held_out_pairs_share_no_source(folder: Path):
    from bestiary.train.translate.data import read_texts

    texts = read_texts(dataclasses.replace(make_config(folder, "x"), dev=(), dev_pairs=60))
    train = list(texts.train())
    assert len(train) + len(texts.dev) == 400
    assert 20 < len(texts.dev) < 120
    assert not {pair.source for pair in train} & {pair.source for pair in texts.dev}
