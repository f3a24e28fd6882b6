"""Paths of object stores on the command line, and a run folder that is published while the run goes on."""

from pathlib import Path

import fsspec
import pytest

from bestiary.data.cloud.mirror import mirror
from bestiary.data.errors import DataError
from bestiary.train.cli import main
from bestiary.train.machine.stores import Publisher, on_mirrors


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine"))
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def test_a_command_reads_and_writes_in_a_store(store, repository, capsys, monkeypatch, tmp_path):
    store.put_file(str(repository / "CONTRIBUTING.md"), "/b/books/one.md")
    flags = "--kind wordpiece --vocab-size 300 --corpus memory://b/books --out memory://b/tokenizer"
    assert main(["tokenizer", "train", *flags.split()]) == 0
    assert "vocab.txt" in {name.rpartition("/")[2] for name in store.find("/b/tokenizer")}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    assert main(["tokenizer", "train", *flags.split()]) == 1
    assert "memory://b/tokenizer exists and is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--data gs://b/none --out memory://b/run", "gs://b/none: needs the package gcsfs"),
        ("--data memory://b/none --out memory://b/run", "memory://b/none: there is no such file or folder"),
        ("--data docs/examples/SST-2 --out https://b/run", "--out https://b/run: cannot be written"),
        ("--data docs/examples/SST-2 --out nowhere://b/run", "--out nowhere://b/run: cannot be written"),
    ],
)
def test_what_cannot_be_read_or_written_is_named(store, capsys, flags, said):
    assert main(["finetune", "sst2", "--model", "none", *flags.split()]) == 1
    assert said in capsys.readouterr().err
    assert not list(store.find("/b"))


def test_a_mistyped_flag_is_said_before_anything_is_copied(store, capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "sst2", "--data", "memory://b/none", "--mdel", "x"])
    assert "--mdel" in capsys.readouterr().err


def begun(folder: Path, said: list[str]) -> Publisher:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.lock").write_text("process 1 on here\n")
    (folder / "metrics.jsonl").write_text("1\n")
    publisher = Publisher(folder, said.append)
    publisher.claim()
    return publisher


def test_a_store_that_fails_does_not_stop_the_training(store, monkeypatch):
    said: list[str] = []
    run = mirror("memory://b/run")
    publisher = begun(run, said)

    def failing(*_: object) -> None:
        raise RuntimeError("quota exceeded")

    with monkeypatch.context() as patched:
        patched.setattr(type(store), "put_file", failing)
        publisher.soon()
        publisher._thread.join()
        assert "memory://b/run NOT WRITTEN" in said[0]
        assert "quota exceeded" in said[0]
        with pytest.raises(DataError, match="quota exceeded"):
            Publisher.finish(publisher)
    publisher.claim()
    publisher.finish()
    assert store.cat_file("/b/run/metrics.jsonl") == b"1\n"
    assert len(said) == 1


def test_a_run_that_another_machine_has_taken_ends(store):
    publisher = begun(mirror("memory://b/run"), [])
    publisher.soon()
    publisher._thread.join()
    store.pipe_file("/b/run/run.lock", b"process 2 on another\n")
    publisher.soon()
    publisher._thread.join()
    with pytest.raises(DataError, match="memory://b/run: this folder now belongs to process 2 on another"):
        publisher.soon()
    with pytest.raises(DataError, match="now belongs to process 2 on another"):
        publisher.now()


def test_the_manifest_of_a_named_step_is_copied_too(store, tmp_path):
    store.pipe({"/b/run/checkpoints/12/state/a": b"a", "/b/run/checkpoints/12.json": b"{}"})
    with on_mirrors(["pretrain"], ["--resume-from", "memory://b/run/checkpoints/12"], lambda _: None) as local:
        step = Path(local[1])
        assert (step / "state" / "a").is_file()
        assert step.with_name("12.json").is_file()


def test_a_text_is_no_path(store):
    """Of one flag, it depends on the command."""
    store.pipe({"/b/text": b"A text.", "/b/run/model/config.json": b"{}"})
    words = ["memory://b/run", "--text", "memory://b/text", "--text-pair=memory://b/none"]
    with on_mirrors(["predict"], words, lambda _: None) as local:
        assert local == [str(mirror("memory://b/run")), *words[1:]]
    with on_mirrors(["perplexity"], ["--text", "memory://b/text"], lambda _: None) as local:
        assert Path(local[1]).read_text() == "A text."
    run = str(mirror("memory://b/run"))
    for words in (
        ["--out", "page.html", "memory://b/none"],
        ["--out=page.html", "memory://b/none", "memory://b/none"],
        ["memory://b/none", "--layers", "1", "2", "memory://b/none"],
    ):
        with on_mirrors(["attention"], ["--model", "memory://b/run", *words], lambda _: None) as local:
            assert local == ["--model", run, *words]
    for command, flag in (("ask", "--answers"), ("ask", "--prompt"), ("embed", "--prompt"), ("probe", "--prompt")):
        words = ["--model=memory://b/run", flag, "memory://b/none", "memory://b/none"]
        with on_mirrors([command], words, lambda _: None) as local:
            assert local == [f"--model={run}", *words[1:]]
    with on_mirrors(["text2text", "score"], ["--prefix", "memory://b/none"], lambda _: None) as local:
        assert local[1] == "memory://b/none"


def test_what_follows_the_name_of_an_output_is_read(store, tmp_path):
    store.pipe({"/b/run/model/config.json": b"{}"})
    words = ["--out", str(tmp_path / "table.tsv"), "memory://b/run"]
    with on_mirrors(["predict"], words, lambda _: None) as local:
        run = Path(local[2])
        assert (run / "model" / "config.json").is_file()
        (run / "more").touch()
    assert not store.exists("/b/run/more")


def test_a_folder_on_a_disk_is_left_alone(tmp_path):
    publisher = begun(tmp_path / "run", [])
    publisher.soon()
    publisher.finish()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["metrics.jsonl", "run.lock"]
