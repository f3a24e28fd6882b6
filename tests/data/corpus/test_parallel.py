"""Parallel text: every form that is read, and what is said of bad input."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from bestiary.data.corpus.parallel import ParallelText, clean_line
from bestiary.data.errors import CorpusError, DataError

Write = Callable[[str, str | bytes], Path]
EN, DE = "one\ntwo\nthree\n", "eins\nzwei\ndrei\n"
PAIRS = [("one", "eins"), ("two", "zwei"), ("three", "drei")]


def read(text: ParallelText) -> list[tuple[str, str]]:
    return [(pair.source, pair.target) for pair in text]


def test_two_files_plain_and_compressed(file: Write):
    plain = ParallelText([file("a.en", EN), file("a.de", DE)])
    packed = ParallelText(
        [
            file("b.en.gz", gzip.compress(EN.encode())),
            file("b.de.zst", zstandard.ZstdCompressor().compress(DE.encode())),
        ]
    )
    assert read(plain) == read(packed) == PAIRS
    assert [pair.line for pair in plain] == [1, 2, 3]


def test_one_file_that_holds_both(file: Write):
    tsv = file("p.tsv", "".join(f"{i}\t{a}\t{b}\tCC-BY\n" for i, (a, b) in enumerate(PAIRS)))
    assert read(ParallelText([tsv], fields=("2", "3"))) == PAIRS
    flat = file("p.jsonl", "".join(json.dumps({"src": a, "trg": b}) + "\n" for a, b in PAIRS))
    assert read(ParallelText([flat], fields=("src", "trg"))) == PAIRS
    hub = file("hub.jsonl", "".join(json.dumps({"translation": {"en": a, "de": b}}) + "\n" for a, b in PAIRS))
    assert read(ParallelText([hub])) == PAIRS
    assert read(ParallelText([hub], languages=("de", "en"))) == [(b, a) for a, b in PAIRS]


def write_translations(folder: Path, splits: dict[str, list[tuple[str, str]]]) -> Path:
    """A folder as tensorflow-datasets prepares wmt14_translate's, without TensorFlow."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir(parents=True)
    features = tfds.features.Translation(languages=("de", "en"))
    infos = []
    for name, pairs in splits.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=tfds.core.Path(folder), dataset_name="wmt14_translate", split=name, filetype_suffix="array_record"
        )
        writer = ArrayRecordWriter(str(template.sharded_filepath(shard_index=0, num_shards=1)), "group_size:1")
        for source, target in pairs:
            writer.write(features.serialize_example({"en": source, "de": target}))
        writer.close()
        infos.append(
            tfds.core.SplitInfo(name=name, shard_lengths=[len(pairs)], num_bytes=1, filename_template=template)
        )
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=infos, filename_template=template, check_data=False
    )
    return folder


def test_tensorflow_datasets_folder(tmp_path: Path):
    folder = write_translations(tmp_path / "wmt14_translate", {"train": PAIRS, "validation": [("x", "ü")]})
    assert read(ParallelText([folder])) == PAIRS
    assert read(ParallelText([folder], languages=("de", "en"))) == [(b, a) for a, b in PAIRS]
    assert read(ParallelText([folder], split="validation")) == [("x", "ü")]
    with pytest.raises(CorpusError, match="no split 'test'"):
        read(ParallelText([folder], split="test"))


def test_unequal_line_counts_say_both(file: Write):
    for left, right, counts in ((EN, "eins\n", "3 lines .* 1:"), ("one\n", DE, "1 lines .* 3:")):
        with pytest.raises(CorpusError, match=counts):
            read(ParallelText([file("a.en", left), file("a.de", right)]))


def test_empty_sides_are_kept_or_left_out_and_counted(file: Write):
    paths = [file("a.en", "one\n\nthree\nfour\n"), file("a.de", "eins\nzwei\n \nvier\n")]
    kept, dropped = ParallelText(paths), ParallelText(paths, empty="drop")
    assert read(kept) == [("one", "eins"), ("", "zwei"), ("three", ""), ("four", "vier")]
    assert read(dropped) == [("one", "eins"), ("four", "vier")]
    assert list(dropped.findings) == [
        "1 line with an empty source, left out: 2",
        "1 line with an empty target, left out: 3",
    ]


def test_a_target_side_that_is_empty(file: Write):
    with pytest.raises(CorpusError, match=r"3 lines .* 0:"):
        read(ParallelText([file("a.en", EN), file("a.de", "")]))
    with pytest.raises(CorpusError, match="no pair of lines"):
        read(ParallelText([file("a.en", EN), file("b.de", "\n\n\n")], empty="drop"))


def test_control_characters_do_not_shift_lines(file: Write):
    paths = [file("a.en", "one\x00\ntw\x0bo\u2028x\nthree\r\n"), file("a.de", "eins\nzwei\x85y\ndrei\n")]
    text = ParallelText(paths)
    assert read(text) == [("one", "eins"), ("tw o x", "zwei y"), ("three", "drei")]
    assert list(text.findings) == ["2 lines with control characters, taken for spaces: 1, 2"]
    assert clean_line("plain") == ("plain", False)


def test_many_findings_show_the_first_lines(file: Write):
    text = ParallelText([file("a.en", "x\n" + "\n" * 20), file("a.de", "y\n" * 21)], empty="drop")
    read(text)
    assert list(text.findings) == ["20 lines with an empty source, left out: 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ..."]


@pytest.mark.parametrize(
    ("name", "content", "fields", "message"),
    [
        ("a.tsv", "one\teins\ntwo\n", None, "a.tsv, line 2: 1 columns"),
        ("a.tsv", "one\teins\ntwo\tzwei\tmore\n", None, "a.tsv, line 2: 3 columns between tabs; line 1 has 2"),
        ("a.tsv", "one\teinstwo\tzwei\nthree\tdrei\n", None, "a.tsv, line 2: 2 columns between tabs; line 1 has 3"),
        ("a.tsv", "one\teins\n", ("en", "de"), "two numbers, from 1"),
        ("a.tsv", "one\teins\n", ("\u0663", "\u00b2"), "two numbers, from 1"),
        ("a.jsonl", '{"en": "a", "de": "b"}\n{"en": "c"}\n', None, "a.jsonl, line 2: no field 'de'"),
        ("a.jsonl", '{"en": "a"\n', None, "a.jsonl, line 1: not JSON"),
        ("a.jsonl", '{"en": 3, "de": "b"}\n', None, "holds int"),
        ("a.txt", "one\n", None, "must end in .tsv"),
    ],
)
def test_bad_files_are_named(file: Write, name: str, content: str, fields: tuple[str, str] | None, message: str):
    with pytest.raises(DataError, match=message):
        read(ParallelText([file(name, content)], fields=fields))


def test_not_utf8_names_file_and_line(file: Write):
    with pytest.raises(CorpusError, match=r"a\.de, line 2: not UTF-8"):
        read(ParallelText([file("a.en", EN), file("a.de", b"eins\nzw\xffei\ndrei\n")]))
    with pytest.raises(CorpusError, match="no such file"):
        ParallelText([file("a.en", EN), Path("nowhere.de")])


def test_the_fingerprint_follows_the_content_alone(file: Write):
    first = ParallelText([file("a.en", EN), file("a.de", DE)]).fingerprint
    assert ParallelText([file("moved/b.en", EN), file("moved/b.de", DE)]).fingerprint == first
    assert ParallelText([file("c.en", EN), file("c.de", DE + "vier\n")]).fingerprint != first


def test_real_files(shared: Path):
    data = shared / "data"
    text = ParallelText([data / "multi30k/train.en.gz", data / "multi30k/train.de.gz"])
    assert sum(1 for _ in text) == 29_000
    pairs = ParallelText([data / "tatoeba/deu-eng.tsv.gz"])
    assert sum(1 for _ in pairs) == 169_813
