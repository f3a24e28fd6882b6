"""Mirrors of an object store: what is copied, in what order, and what a process that was killed leaves."""

import json
import shutil
from pathlib import Path

import fsspec
import pytest

from bestiary.data.cloud.caches import build_once
from bestiary.data.cloud.mirror import ClaimedError, claim, fetch, in_urls, mirror, publish, scheme_of, url_of
from bestiary.data.errors import DataError


class Machine:
    """A machine with a disk of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self._folder, self._monkeypatch = folder, monkeypatch

    def __call__(self, number: int) -> None:
        self._monkeypatch.setenv("XDG_CACHE_HOME", str(self._folder / str(number)))


@pytest.fixture
def on_machine(tmp_path, monkeypatch) -> Machine:
    machine = Machine(tmp_path, monkeypatch)
    machine(0)
    return machine


@pytest.fixture
def store():
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def puts(store, monkeypatch) -> list[str]:
    """Names of the objects that are written and removed, in order."""
    done: list[str] = []
    put, remove = store.put_file, store.rm_file
    monkeypatch.setattr(
        type(store), "put_file", lambda _, source, to: (done.append(to.removeprefix("/b/")), put(source, to))[1]
    )
    monkeypatch.setattr(
        type(store), "rm_file", lambda _, path: (done.append(f"-{path.removeprefix('/b/')}"), remove(path))[1]
    )
    return done


def test_a_path_of_a_store_has_a_mirror_and_back(on_machine):
    for url in ("gs://bucket/books/a.txt", "memory://b/run", "file:///disk/x"):
        assert url_of(mirror(url)) == url
        assert in_urls(f"{mirror(url)}, line 3: wrong") == f"{url}, line 3: wrong"
        assert scheme_of(url) == url.partition(":")[0]
    assert [scheme_of(text) for text in ("runs/a", "tfds:glue", "https://a.org", "see gs://b or not")] == [None] * 4
    assert url_of(Path("runs/a")) is None
    with pytest.raises(DataError, match=r"'\.\.'"):
        mirror("gs://bucket/../other")


def test_only_what_differs_is_copied(on_machine, store):
    store.pipe({"/b/books/one.txt": b"one", "/b/books/more/two.txt": b"two"})
    books = mirror("memory://b/books")
    said: list[str] = []
    fetch(books, report=said.append)
    assert (books / "more" / "two.txt").read_text() == "two"
    assert said == [f"copying memory://b/books to this machine: 2 files, {6 / 2**20:,.1f} MiB"]
    fetch(books, report=said.append)
    assert len(said) == 1
    store.pipe("/b/books/one.txt", b"uno")
    store.rm("/b/books/more/two.txt")
    fetch(books, report=said.append)
    assert "1 files" in said[1]
    assert (books / "one.txt").read_text() == "uno"
    assert not (books / "more" / "two.txt").exists()


def test_what_is_not_there_is_named(on_machine, store):
    with pytest.raises(FileNotFoundError, match="memory://b/none: there is no such file or folder"):
        fetch(mirror("memory://b/none"))
    fetch(mirror("memory://b/none"), missing=True)
    with pytest.raises(DataError, match="gcsfs"):
        fetch(mirror("gs://b/none"))


def test_what_counts_is_written_last_and_removed_first(on_machine, store, puts):
    run = mirror("memory://b/run")
    for name in ("config.json", "results.json", "model/config.json", "model/weights", "checkpoints/5/state/d/a",
                 "checkpoints/5.json", ".unfinished-1@x-y", "checkpoints/6.orbax-checkpoint-tmp-3/state",
                 ".unfinished-1@x-model/config.json", "metrics.jsonl", "best.safetensors"):  # fmt: skip
        written(run / name, name)
    publish(run)
    assert puts == [
        f"run/{name}"
        for name in ("checkpoints/5/state/d/a", "model/weights", "best.safetensors", "metrics.jsonl",
                     "checkpoints/5.json", "model/config.json", "config.json", "results.json")
    ]  # fmt: skip
    puts.clear()
    written(run / "model" / "weights", "other weights")
    written(run / "model" / "config.json", "new")
    written(run / "checkpoints" / "6" / "state" / "d" / "a", "six")
    written(run / "checkpoints" / "6.json", "six")
    (run / "checkpoints" / "5.json").unlink()
    (run / "checkpoints" / "5" / "state" / "d" / "a").unlink()
    publish(run)
    names = ["-model/config.json", "checkpoints/6/state/d/a", "model/weights", "checkpoints/6.json",
             "model/config.json", "-checkpoints/5.json", "-checkpoints/5/state/d/a"]  # fmt: skip
    assert [name.replace("run/", "") for name in puts] == names
    puts.clear()
    publish(run)
    assert puts == []


def test_a_run_that_another_machine_went_on_with_is_copied_anew(on_machine, store):
    run = mirror("memory://b/run")
    written(run / "metrics.jsonl", "1\n")
    publish(run)
    written(run / "metrics.jsonl", "1\n2 of the first machine\n")
    fetch(run, together=True)  # nobody went on with it: what was not published stays
    assert "first machine" in (run / "metrics.jsonl").read_text()
    on_machine(1)
    there = mirror("memory://b/run")
    fetch(there, together=True)
    written(there / "metrics.jsonl", "1\n2\n3\n")
    written(there / "checkpoints" / "3.json", "{}")
    publish(there)
    on_machine(0)
    written(run / "checkpoints" / "2.json", "{}")
    said: list[str] = []
    fetch(run, together=True, report=said.append)
    assert "memory://b/run has changed since this machine last worked on it" in said[0]
    assert (run / "metrics.jsonl").read_text() == "1\n2\n3\n"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["3.json"]


def test_what_is_missing_here_is_not_removed_there(on_machine, store):
    """Somebody has emptied the cache, or a run's checkpoints are not needed here."""
    run = mirror("memory://b/run")
    for name in ("metrics.jsonl", "checkpoints/3.json"):
        written(run / name, name)
    publish(run)
    shutil.rmtree(run)
    fetch(run, together=True, left_out=lambda _: "checkpoints/")
    written(run / "metrics.jsonl", "more")
    publish(run)
    assert sorted(store.find("/b/run")) == ["/b/run/checkpoints/3.json", "/b/run/metrics.jsonl"]
    assert not (run / "checkpoints").exists()
    fetch(run / "checkpoints", together=True)
    assert (run / "checkpoints" / "3.json").exists()


def test_the_last_process_to_claim_a_folder_has_it(on_machine, store):
    run = mirror("memory://b/run")
    written(run / "run.lock", "process 1 on a, since 10:00")
    written(run / "metrics.jsonl", "1\n")
    claim(run)
    publish(run)
    store.pipe("/b/run/run.lock", b"process 2 on b, since 11:00")  # another machine's claim
    for path in (run, run / "metrics.jsonl"):
        with pytest.raises(ClaimedError, match=r"memory://b/run: .* now belongs to process 2 on b, since 11:00"):
            publish(path)
    store.rm("/b/run", recursive=True)
    with pytest.raises(ClaimedError, match="nobody: it was removed"):
        publish(run)


def test_a_kill_while_publishing_leaves_what_was_there(on_machine, store, monkeypatch):
    """The store fails at the third object; what was copied is not copied again."""
    run = mirror("memory://b/run")
    for name in ("checkpoints/5/a", "checkpoints/5/b", "checkpoints/5/c", "checkpoints/5.json"):
        written(run / name, name)
    put = store.put_file
    copied: list[str] = []

    def failing(_: object, source: str, to: str) -> None:
        if len(copied) == 2:
            raise ConnectionError("no network")
        put(source, to)
        copied.append(to)

    with monkeypatch.context() as patched:
        patched.setattr(type(store), "put_file", failing)
        with pytest.raises(ConnectionError, match="memory://b/run: no network"):
            publish(run)
    assert not store.exists("/b/run/checkpoints/5.json")
    assert len(copied) == 2
    publish(run)
    assert len(copied) == 2
    assert json.loads(json.dumps(sorted(store.find("/b/run")))) == [
        f"/b/run/checkpoints/{name}" for name in ("5.json", "5/a", "5/b", "5/c")
    ]


def test_what_a_kill_left_unpublished_is_not_dropped(on_machine, store, monkeypatch):
    """The store has a part of it, of which this machine's index knows no version."""
    run = mirror("memory://b/run")
    written(run / "metrics.jsonl", "1\n")
    publish(run)
    written(run / "metrics.jsonl", "1\n2\n")
    written(run / "model" / "weights", "new")
    written(run / "model" / "config.json", "{}")
    put = store.put_file

    def killed(*_: object, **__: object) -> None:
        raise SystemExit

    def put_until_killed(_: object, source: str, to: str) -> None:
        put(source, to)
        if to.endswith("metrics.jsonl"):
            raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(type(store), "put_file", put_until_killed)
        patched.setattr(type(store), "find", killed)  # which leaves no time to see what has been copied
        with pytest.raises(SystemExit):
            publish(run)
    said: list[str] = []
    fetch(run, together=True, report=said.append)
    assert said == []
    assert (run / "metrics.jsonl").read_text() == "1\n2\n"
    assert (run / "model" / "config.json").exists()
    publish(run)
    assert {name: store.cat_file(name) for name in store.find("/b/run")} == {
        "/b/run/metrics.jsonl": b"1\n2\n", "/b/run/model/config.json": b"{}", "/b/run/model/weights": b"new",
    }  # fmt: skip


def test_errors_of_a_store_name_the_path(on_machine, store, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(type(store), "find", refused)
    with pytest.raises(PermissionError, match=r"^memory://b/books: Access Denied$"):
        fetch(mirror("memory://b/books"))


def test_a_cache_in_a_store_is_built_once(on_machine, store):
    builds: list[Path] = []

    def build(folder: Path) -> None:
        builds.append(folder)
        written(folder / "vocab.txt", "a")

    for number in range(2):
        on_machine(number)
        folder = build_once(mirror("memory://b/cache") / "tokenizers" / "0f", build)
        assert (folder / "vocab.txt").read_text() == "a"
    assert len(builds) == 1
    store.rm("/b/cache/tokenizers/0f/complete.json")  # as if publishing it had been cut short
    on_machine(2)
    assert build_once(mirror("memory://b/cache") / "tokenizers" / "0f", build).is_dir()
    assert len(builds) == 2
    assert store.exists("/b/cache/tokenizers/0f/complete.json")


def test_a_cache_whose_publishing_failed_is_published_by_the_next_start(on_machine, store, monkeypatch):
    def build(folder: Path) -> None:
        written(folder / "vocab.txt", "a")
        written(folder / "vocab.json", "b")

    def failing(*_: object) -> None:
        raise ConnectionError("no network")

    folder = mirror("memory://b/cache") / "tokenizers" / "0f"
    with monkeypatch.context() as patched:
        patched.setattr(type(store), "put_file", failing)
        with pytest.raises(ConnectionError):
            build_once(folder, build)
    build_once(folder, build)
    assert {name.rpartition("/")[2] for name in store.find("/b/cache")} == {"vocab.txt", "vocab.json", "complete.json"}
