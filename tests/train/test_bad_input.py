"""Bad input: one clear message, a non-zero exit, and no work lost or begun."""

import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from bestiary.train import checkpoint
from bestiary.train.cli import main


@pytest.fixture
def refused(workshop, tmp_path, capsys):
    """Run the command in this process, expect a refusal, and return what was said."""

    def run(*more: str, out: Path | None = None) -> str:
        out = out or tmp_path / "run"
        before = sorted(out.rglob("*")) if out.exists() else None
        try:
            status = main(workshop.arguments(out, *more))
        except SystemExit as exit:  # the command line itself was refused
            status = exit.code
        said = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert status in (1, 2), said
        assert "Traceback" not in said
        assert (sorted(out.rglob("*")) if out.exists() else None) == before, "a refused run leaves nothing behind"
        return said

    return run


def test_a_missing_corpus(refused, tmp_path):
    assert str(tmp_path / "nowhere") in refused("--corpus", str(tmp_path / "nowhere"))


def test_an_empty_corpus(refused, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "empty" in refused("--corpus", str(tmp_path / "empty.txt"))


def test_a_corpus_that_is_not_utf_8(refused, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"one line\nanother line\nna\xefve\n")
    said = refused("--corpus", str(tmp_path / "latin.txt"))
    assert "latin.txt, line 3: not UTF-8 (byte 0xef at column 3)" in said
    assert "--encoding" in said


def test_fewer_documents_than_pairs_need(refused, tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"Sentence one of {number}. Sentence two. Sentence three.")
    assert "4 are needed" in refused("--corpus", *(str(tmp_path / f"{number}.txt") for number in range(3)))


def test_a_vocabulary_without_mask(refused, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "ba", "ko"]))
    assert "[MASK]" in refused("--tokenizer", str(tmp_path / "vocab.txt"))


def test_a_tokenizer_of_another_size_than_the_model(refused, uninterrupted, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    said = refused("--tokenizer", str(tmp_path / "vocab.txt"), "--init-from", str(uninterrupted / "model"))
    assert "has a vocabulary of" in said
    assert "the tokenizer one of 7" in said


def test_a_length_beyond_the_positions(refused):
    said = refused("--sequence-length", "1024", "--batch-tokens", "8192")
    assert "The sequence length 1024 is beyond the model's 512 positions" in said


def test_a_mesh_that_does_not_divide_the_devices(refused):
    assert "--mesh data=3 needs 3 x 1 x 1 x 1 devices, but 8 were found" in refused("--mesh", "data=3")


def test_a_mesh_that_does_not_divide_the_batch(refused):
    assert "A batch of 12 rows cannot be divided over 8 devices" in refused("--batch-tokens", "384")
    assert "A batch of 12 rows cannot be divided" in refused("--batch-tokens", "384", "--parallel", "pmap")
    assert "cannot be computed in 3 parts" in refused("--accumulate", "3")


def test_a_batch_that_is_no_multiple_of_the_length(refused):
    assert "--batch-tokens 500 is not a multiple of the sequence length 32" in refused("--batch-tokens", "500")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "bert-huge"], "there is no such size. Did you mean 'bert-large'?"),
        (["--mask-rate", "0"], "--mask-rate is 0.0"),
        (["--dropout", "1"], "--dropout is 1.0"),
        (["--warmup", "100"], "Warmup takes 100 steps, but the phase has 24"),
        (["--phases", "32:10", "64:5"], "leave out --sequence-length and --steps"),
        (["--log-every", "0"], "--log-every is 0; it must be at least 1."),
        (["--process", "1"], "need --coordinator, --processes and --process together"),
        (["--parallel", "pmap", "--mesh", "data=4,tensor=2"], "must put all devices on the data axis"),
    ],
)
def test_settings_that_make_no_sense(refused, flags, message):
    assert message in refused(*flags)


def test_a_folder_that_is_not_a_run(refused, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("My life's work")
    assert "exists and is not a run folder" in refused(out=tmp_path / "thesis")


def test_a_run_folder_of_another_configuration(refused, uninterrupted):
    said = refused("--learning-rate", "0.5", "--mesh", "data=8", out=uninterrupted)
    assert "holds a run with another configuration" in said
    assert "optim.learning_rate: 0.001 there, 0.5 asked for" in said
    assert "mesh" not in said  # may differ


def test_a_checkpoint_beyond_the_end(workshop, uninterrupted, tmp_path, capsys):
    arguments = workshop.arguments(tmp_path / "run", "--resume-from", str(uninterrupted), steps="20")
    assert main(arguments) == 1
    assert "is at step 24, and this run has 20" in capsys.readouterr().err


def test_a_checkpoint_of_other_phases(refused, workshop, uninterrupted, tmp_path, capsys):
    arguments = workshop.arguments(
        tmp_path / "run",
        "--phases",
        "32:10",
        "32:20",
        "--resume-from",
        str(uninterrupted),
        sequence_length=None,
        steps=None,
    )
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "The saved position is after 24 steps of phase 1; this run has 10 steps of 32 tokens, 20 steps of" in said
    assert not (tmp_path / "run").exists(), "a refused run leaves nothing behind"


def test_a_full_disk_is_seen_before_the_start(workshop, tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert main(workshop.arguments(tmp_path / "run")) == 1
    said = capsys.readouterr().err
    assert "MiB are needed for the checkpoints, 0 MiB are free" in said


def test_a_disk_that_fills_up_does_not_end_the_training(workshop, tmp_path, capsys, monkeypatch):
    def full(folder: Path, step: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / f"{step}.json"))

    monkeypatch.setattr(checkpoint, "write_manifest", full)
    assert main(workshop.arguments(tmp_path / "run", steps="3", evaluate_every="0", checkpoint_every="1")) == 0
    said = capsys.readouterr()
    assert "No space left on device" in said.out + said.err
    assert f"the disk of {tmp_path / 'run' / 'checkpoints'}" in said.out + said.err
    assert not list((tmp_path / "run" / "checkpoints").glob("*.json"))
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_a_loss_that_is_not_finite_saves_the_batch(workshop, tmp_path, capsys):
    flags = ["--learning-rate", "1e30", "--clip-norm", "0", "--warmup", "1", "--log-every", "1"]
    assert main(workshop.arguments(tmp_path / "run", *flags)) == 1
    said = capsys.readouterr().err
    assert "the loss or its gradient is not finite" in said
    (batch,) = (tmp_path / "run").glob("bad-batch-step-*-process-0.npz")
    step = int(batch.name.split("-")[3])
    assert f"Step {step}: " in said
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, step))
    saved = [int(path.stem) for path in (tmp_path / "run" / "checkpoints").glob("*.json")]
    assert all(at < step for at in saved), "a state that is not finite would be resumed from for ever"
