"""A cache holds every token, is built once, survives kills, and is never taken for whole before it is."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bestiary.data import (
    Corpus,
    CorpusError,
    DataError,
    DocumentStore,
    Tokenizer,
    build_documents,
    train_byte_bpe,
)
from bestiary.data.corpus import document_store
from bestiary.data.corpus.document_store import RECORD_TOKENS
from bestiary.data.progress import Report
from bestiary.data.store import FORMAT_VERSION
from bestiary.data.tokenizers.wordpiece import WordPieceTokenizer

Sentences = list[list[list[str]]]


def everything(cache: DocumentStore) -> list[np.ndarray]:
    """The arrays of the index, then all records."""
    return [*(getattr(cache, name) for name in cache.index), *cache.read_records(range(cache.counts.records))]


def assert_same(one: DocumentStore, other: DocumentStore) -> None:
    assert one.counts == other.counts
    for mine, theirs in zip(everything(one), everything(other), strict=True):
        np.testing.assert_array_equal(mine, theirs)


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_byte_level_pieces_are_those_of_the_running_text(tmp_path: Path):
    """Sentences of a paragraph keep the spaces between them, where there are any."""
    text = "It rained. He left!  She stayed.\n\nA new paragraph. The end."
    (tmp_path / "a.txt").write_text(text)
    corpus = Corpus((str(tmp_path / "a.txt"),))
    tokenizer = train_byte_bpe([*corpus], vocab_size=270)
    store = build_documents(corpus, tokenizer, tmp_path / "stores", processes=1)
    sentences = store.document(0)
    assert len(sentences) == 5
    paragraphs = ["It rained. He left! She stayed.", "A new paragraph. The end."]
    found = np.concatenate(sentences).tolist()
    assert found == [piece for ids in tokenizer.encode_batch(paragraphs) for piece in ids]


def test_every_token_of_every_sentence(cache: DocumentStore, documents: tuple[Path, Sentences], tokenizer: Tokenizer):
    expected = documents[1]
    assert cache.counts.documents == len(expected) == 60
    for number, sentences in enumerate(expected):
        found = [[tokenizer.tokens[token] for token in sentence] for sentence in cache.document(number)]
        assert found == sentences
    tokens = [sum(map(len, sentences)) for sentences in expected]
    np.testing.assert_array_equal(cache.document_tokens, tokens)
    counts = cache.counts
    assert (counts.tokens, counts.sentences) == (sum(tokens), sum(map(len, expected)))
    assert (counts.empty_documents, counts.cut_sentences, counts.unknown_tokens) == (0, 0, 0)
    assert counts.characters == sum(len(file.read_text()) for file in documents[0].iterdir())


def test_tensorflow_datasets_reads_it(cache: DocumentStore, documents: tuple[Path, Sentences]):
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(cache.folder).as_data_source(split="documents")
    assert len(source) == cache.counts.records
    example = source[7]
    assert (example["document"], example["source"]) == (7, b"0007.txt, line 1")
    np.testing.assert_array_equal(example["tokens"], np.concatenate(cache.document(7)))
    assert example["sentence_lengths"].tolist() == [len(sentence) for sentence in documents[1][7]]
    # Our own serialiser, which is faster, writes what tfds' own would.
    raw = tfds.builder_from_directory(cache.folder).as_data_source(
        split="documents", deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
    features = tfds.builder_from_directory(cache.folder).info.features
    assert features.deserialize_example_np(features.serialize_example(example)).keys() == example.keys()
    assert len(features.serialize_example(example)) == len(raw[7])


def test_long_documents_lie_in_several_records(tmp_path: Path, tokenizer: Tokenizer, write_documents: Callable):
    write_documents(tmp_path / "text", 2, sentences=(1500,))
    path = tmp_path / "text" / "9999.txt"
    path.write_text("baao " * (2 * RECORD_TOKENS) + "baao.")  # one sentence, longer than a record
    cache = build_documents(Corpus([tmp_path / "text"]), tokenizer, tmp_path / "caches")
    records = cache.read_records(range(cache.counts.records))
    assert len(records) > 3
    assert max(map(len, records)) <= RECORD_TOKENS
    np.testing.assert_array_equal(cache.record_tokens, [len(record) for record in records])
    bounds = np.cumsum(cache.sentence_lengths, dtype=np.int64)[cache.record_sentences[1:] - 1]
    np.testing.assert_array_equal(bounds, np.cumsum([len(record) for record in records]))
    assert cache.counts.cut_sentences == 1
    assert [len(sentence) for sentence in cache.document(2)] == [RECORD_TOKENS, RECORD_TOKENS, 2]


def test_text_without_tokens_is_counted_and_left_out(tmp_path: Path, tokenizer: Tokenizer):
    lines = [{"text": text} for text in ("baao.", "", "\u200b\u200b", "caao unknownword. \u200b", "   ")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    cache = build_documents(Corpus([tmp_path / "a.jsonl"]), tokenizer, tmp_path / "caches")
    counts = cache.counts
    assert (counts.documents, counts.empty_documents, counts.unknown_tokens) == (2, 3, 1)
    assert [[len(s) for s in cache.document(number)] for number in range(2)] == [[2], [3]]


def test_special_tokens_written_in_a_text_are_text(tmp_path: Path, tokenizer: Tokenizer):
    (tmp_path / "a.txt").write_text("Baao [SEP] caao [MASK] .")
    (sentence,) = build_documents(Corpus([tmp_path / "a.txt"]), tokenizer, tmp_path / "caches").document(0)
    assert tokenizer.sep_id not in sentence
    assert tokenizer.mask_id not in sentence


# --- built once -------------------------------------------------------------------------------------------------------


def test_key_follows_corpus_tokenizer_and_language(tmp_path: Path, tokenizer: Tokenizer):
    (tmp_path / "a.txt").write_text("Baao caao.")
    (tmp_path / "b.txt").write_text("Baao caao!")
    from tokenizers import normalizers

    backend = type(tokenizer.backend).from_str(tokenizer.backend.to_str())
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    caches = [
        build_documents(Corpus([tmp_path / name]), used, tmp_path / "caches", language=language)
        for name, used, language in (
            ("a.txt", tokenizer, "en"),
            ("b.txt", tokenizer, "en"),
            ("a.txt", WordPieceTokenizer(backend), "en"),
            ("a.txt", tokenizer, "de"),
        )
    ]
    assert len({cache.fingerprint for cache in caches}) == 4
    assert [cache.counts.unknown_tokens for cache in caches] == [0, 1, 1, 0]


def test_a_second_build_does_nothing(tmp_path: Path, tokenizer: Tokenizer, documents: tuple[Path, Sentences]):
    reports: list[Report] = []
    first = build_documents(Corpus([documents[0]]), tokenizer, tmp_path, progress=reports.append)
    assert reports[-1].done == reports[-1].total > 0
    assert "MB/s" in str(reports[-1])
    stamps = {file: file.stat().st_mtime_ns for file in first.folder.iterdir()}
    reports.clear()
    second = build_documents(Corpus([documents[0]]), tokenizer, tmp_path, progress=reports.append)
    assert not reports
    assert {file: file.stat().st_mtime_ns for file in second.folder.iterdir()} == stamps
    assert not list(tmp_path.glob("*.building*")), "nothing is left beside the cache"
    assert_same(first, second)


# --- kills, crowds and full disks -------------------------------------------------------------------------------------

BUILDER = """
import sys
from bestiary.data import Corpus, build_documents, load_tokenizer
from bestiary.data.corpus import document_store

if __name__ == "__main__":
    document_store.SMALLEST_CHUNK = 1 << 15
    corpus, tokenizer, root, processes = sys.argv[1:]
    print("started", flush=True)
    print(build_documents(Corpus([corpus]), load_tokenizer(tokenizer), root, processes=int(processes)).folder)
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory, write_documents: Callable) -> Path:
    """About 2 MB of text."""
    folder = tmp_path_factory.mktemp("big")
    write_documents(folder, 400, seed=1, sentences=(80,))
    return folder


@pytest.fixture
def start(tmp_path: Path, tokenizer: Tokenizer, big: Path) -> Callable[..., subprocess.Popen]:
    """Starts a build of `big` into tmp_path/caches in a process of its own."""
    (tmp_path / "builder.py").write_text(BUILDER)
    tokenizer.save(tmp_path / "tokenizer")

    def run(processes: int = 1, before: tuple[str, ...] = (), **options) -> subprocess.Popen:
        command = [*before, sys.executable, "-W", "error", str(tmp_path / "builder.py"), str(big)]
        command += [str(tmp_path / "tokenizer"), str(tmp_path / "caches"), str(processes)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)

    return run


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def alive(process: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_for(what: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through /proc")
def test_a_killed_build_goes_on_where_it_was(
    start: Callable, tmp_path: Path, big: Path, monkeypatch: pytest.MonkeyPatch
):
    root = tmp_path / "caches"
    for processes, finished in ((2, 3), (1, 12)):
        builder = start(processes)
        wait_for(lambda count=finished: len(list(root.glob("*.building/shard-*.npz"))) >= count)
        helpers = children(builder.pid)
        builder.send_signal(signal.SIGKILL)
        builder.communicate()
        assert builder.returncode == -signal.SIGKILL
        wait_for(lambda pids=helpers: not any(map(alive, pids)))
        assert not list(root.glob("*/cache.json")), "a part is not taken for the whole"
    done = {file: file.stat().st_mtime_ns for file in root.glob("*.building/shard-*.npz")}
    assert len(done) >= 12

    from bestiary.data import load_tokenizer, store_build

    monkeypatch.setattr(document_store, "SMALLEST_CHUNK", 1 << 15)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    reports: list[Report] = []
    written: list[int] = []
    write = store_build._Worker._write
    monkeypatch.setattr(
        store_build._Worker,
        "_write",
        lambda self, number, encoded: (written.append(number), write(self, number, encoded)),
    )
    resumed = build_documents(Corpus([big]), tokenizer, root, progress=reports.append)
    assert len(written) == len(list(resumed.folder.glob("*.array_record-*"))) - len(done), (
        "what was finished is not done again"
    )
    assert reports[-1].resumed > 0
    assert_same(resumed, build_documents(Corpus([big]), tokenizer, tmp_path / "uninterrupted"))


def test_a_build_that_ends_before_the_last_renaming_is_not_whole(
    tmp_path: Path,
    tokenizer: Tokenizer,
    documents: tuple[Path, Sentences],
    cache: DocumentStore,
    monkeypatch: pytest.MonkeyPatch,
):
    from bestiary.data import store_build

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store_build, "_rename_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        build_documents(Corpus([documents[0]]), tokenizer, tmp_path)
    assert not (tmp_path / cache.fingerprint).exists()
    monkeypatch.undo()
    assert_same(build_documents(Corpus([documents[0]]), tokenizer, tmp_path), cache)


def test_two_builders_at_once(start: Callable, tmp_path: Path, big: Path):
    builders = [start(), start()]
    folders = []
    for builder in builders:
        output, errors = builder.communicate(timeout=120)
        assert builder.returncode == 0, errors
        folders.append(output.split()[-1])
    assert folders[0] == folders[1]
    assert [path.name for path in (tmp_path / "caches").iterdir() if path.is_dir()] == [Path(folders[0]).name]
    assert DocumentStore(folders[0]).counts.documents == 400


def test_a_full_disk_is_told_and_leaves_no_half_cache(start: Callable, tmp_path: Path):
    builder = start(before=("bash", "-c", 'ulimit -f 48 && exec "$@"', "bash"))  # files of at most 48 KiB
    _, errors = builder.communicate(timeout=120)
    assert builder.returncode == 1
    assert "DataError: " in errors.splitlines()[-1]
    assert "no room to write the tokenised corpus" in errors.splitlines()[-1]
    assert "MB free" in errors.splitlines()[-1]
    assert not list((tmp_path / "caches").glob("*/cache.json"))


def test_a_builder_that_dies_is_told(tmp_path: Path, tokenizer: Tokenizer, big: Path, monkeypatch: pytest.MonkeyPatch):
    from bestiary.data import store_build

    monkeypatch.setattr(store_build, "_do", _die)
    with pytest.raises(DataError, match=r"A tokenising process died, .* start again with fewer processes"):
        build_documents(Corpus([big]), tokenizer, tmp_path, processes=2)


def _die(chunk: object) -> None:
    os._exit(9)


def test_an_unreadable_corpus_leaves_nothing_behind(tmp_path: Path, tokenizer: Tokenizer):
    (tmp_path / "a.txt").write_bytes(b"good\n\xff")
    with pytest.raises(CorpusError, match="line 2: not UTF-8"):
        build_documents(Corpus([tmp_path / "a.txt"]), tokenizer, tmp_path / "caches")
    assert not [path for path in (tmp_path / "caches").iterdir() if path.is_dir()]


def test_a_corpus_of_nothing_but_empty_documents(tmp_path: Path, tokenizer: Tokenizer):
    (tmp_path / "a.txt").write_text("\u200b")
    with pytest.raises(CorpusError, match="the corpus is empty: its text has no tokens"):
        build_documents(Corpus([tmp_path / "a.txt"]), tokenizer, tmp_path / "caches")


# --- opening ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path, tokenizer: Tokenizer) -> DocumentStore:
    """A store of one short document, in tmp_path/caches."""
    (tmp_path / "a.txt").write_text("Baao caao.")
    return build_documents(Corpus([tmp_path / "a.txt"]), tokenizer, tmp_path / "caches")


def test_damaged_stores_are_refused(small: DocumentStore):
    folder = small.folder
    again = f"Delete the folder {folder}; it will be built again."

    def refusal(**options: bool) -> str:
        with pytest.raises(DataError) as raised:
            DocumentStore(folder, **options)
        return str(raised.value)

    for file in (*folder.glob("*.array_record-*"), *folder.glob("*.npy")):
        content = file.read_bytes()
        file.write_bytes(content[:100])
        assert refusal() == f"{file}: 100 bytes, expected {len(content)} bytes. {again}"
        file.unlink()
        assert refusal() == f"{file}: missing, expected {len(content)} bytes. {again}"
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert refusal(verify=True) == f"{file}: the contents have changed since it was written. {again}"
        file.write_bytes(content)
    header = json.loads((folder / "cache.json").read_text())
    (folder / "cache.json").write_text(json.dumps({**header, "version": 0}))
    assert refusal() == f"{folder / 'cache.json'}: version 0, expected {FORMAT_VERSION}. {again}"
    (folder / "cache.json").write_text(json.dumps({**header, "kind": "pairs"}))
    assert refusal() == f"{folder}: a store of pairs, expected documents."
    for content in (
        "{",
        "[]",
        "[" * 10**5,
        json.dumps({**header, "files": 5}),
        json.dumps({**header, "files": {"a": 1}}),
    ):
        (folder / "cache.json").write_text(content)
        assert "not a cache's description" in refusal()
    (folder / "cache.json").unlink()
    assert "no tokenised cache" in refusal()


def test_a_changed_record_is_not_read(small: DocumentStore):
    (shard,) = small.folder.glob("*.array_record-*")
    content = bytearray(shard.read_bytes())
    place = content.index(b"sentence_lengths") if b"sentence_lengths" in content else 100
    content[place] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"(?s)hash mismatch.*Delete the folder"):
        DocumentStore(small.folder).document(0)


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "no header"])
def test_a_damaged_store_is_built_again_with_a_line(
    small: DocumentStore, tokenizer: Tokenizer, tmp_path: Path, damage: str
):
    expected = everything(small)
    (shard,) = small.folder.glob("*.array_record-*")
    content = shard.read_bytes()
    match damage:
        case "cut":
            shard.write_bytes(content[:-1])
        case "changed":
            shard.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
        case "missing":
            (small.folder / "document_hashes.npy").unlink()
        case "no header":
            (small.folder / "cache.json").write_text("")
    reports: list[Report] = []
    again = build_documents(Corpus([tmp_path / "a.txt"]), tokenizer, tmp_path / "caches", progress=reports.append)
    assert again.folder == small.folder
    for mine, theirs in zip(everything(again), expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert f"once more: {small.folder}" in str(reports[-1])
    reports.clear()
    build_documents(Corpus([tmp_path / "a.txt"]), tokenizer, tmp_path / "caches", progress=reports.append)
    assert not reports


def test_a_store_of_version_1_is_read(small: DocumentStore, tokenizer: Tokenizer, tmp_path: Path):
    header = json.loads((small.folder / "cache.json").read_text())
    old = {
        **header["made_from"],
        "version": 1,
        "key": header["key"],
        "cls_id": 2,
        "sep_id": 3,
        "counts": header["counts"],
        "shard_bytes": {name: size for name, (size, _) in header["files"].items() if not name.endswith(".npy")},
    }
    (small.folder / "cache.json").write_text(json.dumps(old))
    reports: list[Report] = []
    opened = build_documents(Corpus([tmp_path / "a.txt"]), tokenizer, tmp_path / "caches", progress=reports.append)
    assert not reports
    assert_same(opened, small)
    assert opened.fingerprint == small.fingerprint


# --- splits -----------------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_and_do_not_depend_on_the_order_of_documents(
    cache: DocumentStore, documents: tuple[Path, Sentences], tokenizer: Tokenizer, tmp_path: Path
):
    train, held = cache.documents("train", 0.2), cache.documents("validation", 0.2)
    assert len(held) == 12
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held])), cache.documents("all"))
    assert set(cache.documents("validation", 0.1)) < set(held)
    files = sorted(documents[0].iterdir(), reverse=True)
    backwards = build_documents(Corpus(files), tokenizer, tmp_path)
    assert set(59 - backwards.documents("validation", 0.2)) == set(held)


def test_equal_documents_are_on_the_same_side(tmp_path: Path, tokenizer: Tokenizer):
    lines = [{"text": f"{'baao ' * (number // 3)}."} for number in range(90)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    cache = build_documents(Corpus([tmp_path / "a.jsonl"]), tokenizer, tmp_path / "caches")
    for fraction in (0.02, 0.1, 0.25, 0.5):
        held = cache.documents("validation", fraction)
        assert len(held) >= 90 * fraction
        assert all(number + step in held for number in held if number % 3 == 0 for step in range(3))


@pytest.mark.parametrize(("count", "least", "enough"), [(1, 1, False), (2, 1, True), (3, 2, False), (4, 2, True)])
def test_how_many_documents_a_split_needs(tmp_path: Path, tokenizer: Tokenizer, count: int, least: int, enough: bool):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "baao " * (n + 1)}) for n in range(count)))
    cache = build_documents(Corpus([tmp_path / "a.jsonl"]), tokenizer, tmp_path / "caches")
    if enough:
        assert len(cache.documents("validation", 0.01, least)) == least
        assert len(cache.documents("train", 0.99, least)) == least
        return
    with pytest.raises(DataError) as raised:
        cache.documents("train", 0.05, least)
    number = "1 document" if count == 1 else f"{count} documents"
    assert str(raised.value).startswith(
        f"{tmp_path}/a.jsonl: {number}, and {2 * least} are needed: {least} to train on and {least} to hold out."
    )
    assert "--validation-corpus" in str(raised.value)


def test_split_refusals(cache: DocumentStore):
    with pytest.raises(DataError, match=r"A validation fraction of 1\.5: expected one between 0 and 1"):
        cache.documents("train", 1.5)
    with pytest.raises(DataError, match="No split 'test'"):
        cache.documents("test")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="60 documents, and pairs of sentences need 100"):
        cache.documents("all", least=100)
