"""Every format gives its documents, and every kind of bad file one message that says where."""

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import zstandard

from bestiary.data import EMBEDDED, Corpus, DataError
from bestiary.data.corpus.fingerprint import corpus_fingerprint
from bestiary.data.reading import CHUNK_BYTES

File = Callable[[str, str | bytes], Path]


def texts(*paths: str | Path, **options) -> list[str]:
    return [document.text for document in Corpus(paths, **options)]


def refusal(*paths: str | Path, **options) -> str:
    with pytest.raises(DataError) as raised:
        list(Corpus(paths, **options))
    return str(raised.value)


# --- formats ----------------------------------------------------------------------------------------------------------


def test_a_text_file_is_a_document(file: File):
    path = file("a.txt", "One\r\nline.\r\n\r\nTwo.")
    (document,) = Corpus([path])
    assert document.paragraphs() == ["One line.", "Two."]
    assert (document.source, document.line) == ("a.txt", 1)


def test_blank_lines_can_part_documents(file: File):
    path = file("a.txt", "\n\nFirst.\nSecond.\n\n \nThird.\n")
    documents = list(Corpus([path], blank_line="document"))
    assert [document.paragraphs() for document in documents] == [["First.", "Second."], ["Third."]]
    assert [document.line for document in documents] == [3, 7]


def test_markdown(file: File):
    (document,) = Corpus([file("a.md", "# Title\n\nSome *words*.")])
    assert document.paragraphs() == ["Title", "Some words."]


WIKITEXT = (
    " \n = One = \n \n Text of one . \n = not a title = \n = = Part = = \n More . \n \n = Two = \n \n Text of two . \n"
)


@pytest.mark.parametrize("name", ["wiki.train.tokens", "wiki.raw", "wiki.txt"])
def test_wikitext_articles(file: File, name: str):
    documents = list(Corpus([file(name, WIKITEXT)]))
    assert [document.paragraphs()[0] for document in documents] == ["One", "Two"]
    assert [document.line for document in documents] == [2, 9]
    assert documents[0].paragraphs() == ["One", "Text of one .", "not a title", "Part", "More ."]


def test_json_lines(file: File):
    lines = [{"text": "One.\nTwo."}, {"text": "Three.", "id": 3}]
    path = file("a.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    assert [document.paragraphs() for document in Corpus([path])] == [["One.", "Two."], ["Three."]]
    other = file("b.json", json.dumps({"body": "Text."}))
    assert texts(other, text_field="body") == ["Text."]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.tokens", "a.jsonl"])
def test_compressed_files_read_the_same(file: File, name: str):
    plain = (json.dumps({"text": "Ünïcode."}) + "\n") * 3 if name == "a.jsonl" else WIKITEXT + "Ünïcode.\n"
    expected = texts(file(name, plain))
    compressed = zstandard.ZstdCompressor().compress
    assert texts(file(f"{name}.gz", gzip.compress(plain.encode()))) == expected
    assert texts(file(f"{name}.zst", compressed(plain.encode()))) == expected
    two_frames = compressed(plain[:10].encode()) + compressed(plain[10:].encode())
    assert texts(file(f"2{name}.zst", two_frames)) == expected


def test_a_folder_is_read_in_the_order_of_names(file: File, tmp_path: Path):
    file("c/b.txt", "second"), file("c/a/z.md", "first"), file("c/c.txt.gz", gzip.compress(b"third"))
    file("c/.hidden.txt", "x"), file("c/.git/d.txt", "x"), file("c/picture.png", b"\xff\xd8")
    corpus = Corpus([tmp_path / "c"])
    assert [(document.text, document.source) for document in corpus] == [
        ("first", "a/z.md"),
        ("second", "b.txt"),
        ("third", "c.txt.gz"),
    ]
    assert [path.name for path in corpus.skipped_files] == ["picture.png"]


def test_prepared_tfds_folder(file: File, tmp_path: Path, write_tfds):
    folder = write_tfds(tmp_path / "sets" / "some" / "1.0.0", ["One.\nTwo.", "", "Drei ü."])
    corpus = Corpus([folder])
    assert [document.paragraphs() for document in corpus] == [["One.", "Two."], ["Drei ü."]]
    assert corpus.counts.empty_documents == 1
    assert corpus.counts.bytes_read == corpus.bytes_total > 0
    file("sets/b.txt", "beside")
    assert texts(tmp_path / "sets") == ["beside", "One.\nTwo.", "Drei ü."]


def test_tfds_refusals(tmp_path: Path, write_tfds):
    folder = write_tfds(tmp_path / "some", ["One."], feature="body")
    assert refusal(folder) == (
        f"{folder}, example 0 of split 'train': no field 'text' (found: body). Name the field with --text-field."
    )
    assert refusal(folder, split="test") == f"{folder}: no split 'test' (found: train)."
    assert "TensorFlow" in refusal("tfds:no_such_data_set") or "has no data set" in refusal("tfds:no_such_data_set")
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    assert "file_format='array_record'" in refusal(folder)


def test_the_embedded_corpus_is_english_prose():
    documents = list(Corpus([EMBEDDED]))
    assert len(documents) > 300
    assert len({document.source for document in documents}) == len(documents)
    words = " ".join(paragraph for document in documents for paragraph in document.paragraphs()).split()
    assert len(words) > 150_000
    assert sum(word in {"the", "of", "is", "a", "to"} for word in words) > 0.1 * len(words)


def test_the_embedded_corpus_is_always_the_same_and_imports_nothing_for_its_docstrings():
    code = (
        "import sys; from bestiary.data import Corpus; from hashlib import sha256;"
        "print(sha256(repr(list(Corpus(['embedded:python']))).encode()).hexdigest(),"
        "[name for name in ('antigravity', 'this', 'tkinter', 'turtle', 'pydoc_data.topics') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{sha256(repr(list(Corpus([EMBEDDED]))).encode()).hexdigest()} []"


# --- counting ---------------------------------------------------------------------------------------------------------


def test_counts(file: File):
    path = file("a.jsonl", '{"text": "abc"}\n{"text": "  "}\n{"text": "defg"}\n')
    corpus = Corpus([path])
    list(corpus)
    list(corpus)  # a second reading counts anew
    assert (corpus.counts.documents, corpus.counts.characters, corpus.counts.empty_documents) == (2, 7, 1)
    assert corpus.counts.bytes_read == corpus.bytes_total == path.stat().st_size


def test_compressed_files_count_their_own_bytes(file: File):
    corpus = Corpus(
        [file("a.txt.gz", gzip.compress(b"word " * 500_000)), file("b.txt.zst", zstandard.compress(b"x" * 999))]
    )
    list(corpus)
    assert corpus.counts.bytes_read >= corpus.bytes_total * 0.99


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_missing_path(tmp_path: Path):
    assert refusal(tmp_path / "no") == (f"{tmp_path}/no: no such file or folder. Check the path given with --corpus.")


def test_no_path():
    assert refusal() == "No corpus: name at least one file or folder."


def test_nothing_in_it(file: File, tmp_path: Path):
    path = file("a.txt", " \n\n")
    assert refusal(path) == (f"{path}: the corpus is empty: none of its documents contains text.")
    (tmp_path / "folder").mkdir()
    assert refusal(tmp_path / "folder").startswith(
        f"{tmp_path}/folder: no text in this folder. Expected files that end in"
    )


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.tokens", "a.jsonl"])
def test_another_encoding_is_told_with_line_and_column(file: File, name: str):
    good = json.dumps({"text": "good"}) if name == "a.jsonl" else "good line ü"
    path = file(name, f"{good}\n".encode() * 811 + b"0123456789abc\xff and more\n")
    assert refusal(path) == (
        f"{path}, line 812: not UTF-8 (byte 0xff at column 14). Convert the file, or pass --encoding."
    )


def test_line_and_column_across_chunks(file: File):
    lines = "ünïcödé wörds\n" * (2 * CHUNK_BYTES // 19)
    path = file("a.txt", lines.encode() + "äöü".encode() + b"\xe4 \n")
    assert f"line {lines.count(chr(10)) + 1}: not UTF-8 (byte 0xe4 at column 4)" in refusal(path)
    cut_short = file("b.txt", "ab\nü".encode()[:-1])
    assert "line 2: not UTF-8 (byte 0xc3 at column 1)" in refusal(cut_short)


def test_named_encodings(file: File):
    path = file("a.txt", "naïve".encode("latin-1"))
    assert texts(path, encoding="latin-1") == ["naïve"]
    assert texts(file("b.txt", "naïve".encode("utf-16")), encoding="utf-16") == ["naïve"]
    assert texts(file("c.txt", b"\xef\xbb\xbfmarked")) == ["marked"]
    assert refusal(path, encoding="utf-88") == ("'utf-88' is not a text encoding; try utf-8, latin-1 or cp1252.")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "not JSON (Expecting ',' delimiter at column 13). Expected one JSON object per line."),
        ('["a"]', "expected a JSON object, found list."),
        ('{"body": "a"}', "no field 'text' (found: body). Name the field with --text-field."),
        ('{"text": 3}', "field 'text' holds int, expected text."),
    ],
)
def test_bad_json_lines(file: File, line: str, message: str):
    path = file("a.jsonl", f'{{"text": "good"}}\n\n{line}\n')
    assert refusal(path) == f"{path}, line 3: {message}"


@pytest.mark.parametrize("cut", [0.3, 0.99])
def test_compressed_files_that_end_early(file: File, cut: float):
    import random

    content = random.Random(0).randbytes(300_000).hex().encode()
    for name, data in (("a.txt.gz", gzip.compress(content)), ("a.txt.zst", zstandard.compress(content))):
        path = file(name, data[: int(len(data) * cut)])
        assert refusal(path).startswith(f"{path}: the compressed data is damaged or truncated.")
    path = file("b.txt.zst", b"not compressed at all")
    assert "damaged" in refusal(path)
    assert "damaged" in refusal(file("b.txt.gz", b"not compressed at all"))


# --- fingerprint ------------------------------------------------------------------------------------------------------


def test_fingerprint_follows_contents_and_order_not_places(file: File, tmp_path: Path):
    file("one/a.txt", "alpha"), file("one/b.txt", "beta"), file("two/a.txt", "alpha"), file("two/b.txt", "beta")
    one, two = tmp_path / "one", tmp_path / "two"
    original = corpus_fingerprint(Corpus([one]))
    assert corpus_fingerprint(Corpus([two])) == original
    assert corpus_fingerprint(Corpus([one], blank_line="document")) != original
    assert corpus_fingerprint(Corpus([one / "a.txt", one / "b.txt"])) != corpus_fingerprint(
        Corpus([one / "b.txt", one / "a.txt"])
    )
    file("two/b.txt", "Beta")
    assert corpus_fingerprint(Corpus([two])) != original


def test_fingerprint_notes_spare_hashing_but_never_hide_a_change(file: File, tmp_path: Path):
    import os

    path, notes = file("a.txt", "alpha"), tmp_path / "notes.json"
    long_ago = 1_000_000_000
    os.utime(path, (long_ago, long_ago))
    original = corpus_fingerprint(Corpus([path]), notes)
    assert corpus_fingerprint(Corpus([path]), notes) == original
    assert str(path.resolve()) in json.loads(notes.read_text())
    file("a.txt", "gamma")  # as long as before
    changed = corpus_fingerprint(Corpus([path]), notes)
    assert changed != original
    notes.write_text("not JSON")
    assert corpus_fingerprint(Corpus([path]), notes) == changed


# --- real data --------------------------------------------------------------------------------------------------------


def test_shared_books_and_wikitext(shared: Path):
    books = list(Corpus([shared / "data" / "books"]))
    assert len(books) == 51
    assert books[0].paragraphs()[:2] == ["Title: Aesop's Fables", "Author: Aesop"]
    counts = {}
    for split in ("train", "valid", "test"):
        counts[split] = len(list(Corpus([shared / "data" / "wikitext2" / f"wiki.{split}.tokens"])))
    assert counts == {"train": 600, "valid": 60, "test": 60}
