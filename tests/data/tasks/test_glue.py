"""GLUE's files with all their quirks, and tables of one's own: what is read, and what is said of what is wrong."""

import gzip
import json

import numpy as np
import pytest

from bestiary.data.errors import DataError
from bestiary.data.tasks.glue import FINETUNED, GLUE, has_labels, has_split, read_glue
from bestiary.data.tasks.tables import TextExample, read_labels, read_table, read_texts


def texts(examples: list[TextExample]) -> list[tuple]:
    return [(example.first, example.second, example.label, example.key) for example in examples]


def test_cola_has_no_line_of_column_names_but_in_its_test_file(file):
    train = file("CoLA/train.tsv", 'gj04\t1\t\t"Quotes are literal.\ngj04\t0\t*\tThem not are.\n')
    file("CoLA/test.tsv", "index\tsentence\n0\tBill whistled.\n1\tThe car honked.\n")
    task = GLUE["cola"]
    assert texts(read_glue(task, train.parent, "train", labelled=True).examples) == [
        ('"Quotes are literal.', None, 1, "0"),
        ("Them not are.", None, 0, "1"),
    ]
    found = read_glue(task, train.parent.parent, "test", labelled=False).examples  # the folder of all tasks
    assert texts(found) == [("Bill whistled.", None, None, "0"), ("The car honked.", None, None, "1")]
    assert not has_split(task, train.parent, "dev")


def test_mrpc_begins_with_a_byte_order_mark_and_has_names_of_its_own(file):
    lines = 'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tHe said "no .\tHe said " no "\n'
    path = file("MRPC/dev.tsv", b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode())
    assert texts(read_glue(GLUE["mrpc"], path.parent, "dev", labelled=True).examples) == [
        ('He said "no .', 'He said " no "', 1, "0")
    ]


def test_mnli_has_two_development_sets_and_named_classes(file):
    columns = "index\tpromptID\tpairID\tsentence1_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
    path = file("MNLI/dev_matched.tsv", f"{columns}0\t1\t1n\t(x)\tA\tB\tneutral\tentailment\n")
    file("MNLI/dev_mismatched.tsv", f"{columns}0\t1\t1n\t(x)\tC\tD\tneutral\tcontradiction\n")
    task = GLUE["mnli"]
    assert texts(read_glue(task, path.parent, "dev_matched", labelled=True).examples) == [("A", "B", 0, "0")]
    assert texts(read_glue(task, path.parent, "dev_mismatched", labelled=True).examples) == [("C", "D", 2, "0")]


def test_qqp_leaves_cut_rows_out_and_counts_them(file):
    path = file(
        "QQP/train.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        "5\t1\t2\tWhy?\tHow?\t0\n6\t3\t4\tcut short\n7\t5\t6\ta\tb\t1\n",
    )
    found = read_glue(GLUE["qqp"], path.parent, "train", labelled=True)
    assert texts(found.examples) == [("Why?", "How?", 0, "5"), ("a", "b", 1, "7")]
    assert found.cut_rows == 1


def test_the_diagnostic_set_with_and_without_labels(file):
    short = file("AX/diagnostic.tsv", "index\tsentence1\tsentence2\n0\tA\tB\n")
    full = file(
        "full/diagnostic-full.tsv", "Lexical Semantics\tDomain\tPremise\tHypothesis\tLabel\n\tNews\tC\tD\tneutral\n"
    )
    task = GLUE["ax"]
    assert not has_labels(task, short.parent.parent, "test")
    assert texts(read_glue(task, short.parent.parent, "test", labelled=False).examples) == [("A", "B", None, "0")]
    assert has_labels(task, full, "test")
    assert texts(read_glue(task, full, "test", labelled=True).examples) == [("C", "D", 1, "0")]


def test_stsb_rates(file):
    path = file("STS-B/train.tsv", "index\tsentence1\tsentence2\tscore\n9\tA\tB\t3.800\n")
    assert texts(read_glue(GLUE["stsb"], path.parent, "train", labelled=True).examples) == [("A", "B", 3.8, "9")]


MRPC = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
QQP = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"


@pytest.mark.parametrize(
    ("task", "name", "content", "message"),
    [
        ("sst2", "train.tsv", "sentence\tlabel\ngood\t1\nbad\t2\n", r"train.tsv, line 3: the label '2' is not in"),
        ("sst2", "train.tsv", "sentence\tlabel\ngood\t1\n\nbad\n", r"line 4: expected 2 fields .*found 1: bad"),
        ("sst2", "train.tsv", "text\tlabel\ngood\t1\n", r"line 2: no column 'sentence' \(found: text, label\)"),
        ("sst2", "train.tsv", "", r"train.tsv: the file is empty"),
        ("sst2", "train.tsv", "sentence\tlabel\n", r"train.tsv: the file is empty"),
        ("cola", "train.tsv", "gj04\t1\t\n", r"line 1: expected 4 fields"),
        (
            "stsb",
            "train.tsv",
            "sentence1\tsentence2\tscore\nA\tB\tnan\n",
            r"line 2: the target is 'nan', expected a fin",
        ),
        ("rte", "train.tsv", "index\tsentence1\tsentence2\tlabel\n0\tA\tB\t\n", r"line 2: the label is missing"),
        (
            "rte",
            "train.tsv",
            b"index\tsentence1\tsentence2\tlabel\n0\tA\xff\tB\tx\n",
            r"line 2: not UTF-8 .*to UTF-8\.$",
        ),
        ("rte", "other.tsv", "x\n", r"expected RTE's files"),
        (
            "mrpc",
            "train.tsv",
            f"{MRPC}1\t1\t2\tA.\tB.0\t3\t4\tC.\tD.\n",
            "line 2: expected 5 fields .*found 9: 1 | 1 | 2",
        ),
        ("mrpc", "train.tsv", f"{MRPC}1\t1\t2\tA.\tmore\tB.\n", "line 2: expected 5 fields .*found 6"),
        ("mrpc", "train.tsv", "index\tsentence1\tsentence2\tlabel\n0\tA\tB\t1\n", "line 2: no column 'Quality'"),
        ("mrpc", "train.tsv", f"{MRPC}\t\t\t\t\n", "line 2: the label is missing"),
        ("qqp", "train.tsv", f"{QQP}5\t1\t2\tA\tB\t0\t6\n", "line 2: expected 6 fields .*found 7"),
        ("qqp", "train.tsv", f"{QQP}5\t1\t2\tA\tB\t0\n5\t1\t2\tC\tD\t1\n", "line 3: another row before has the id '5'"),
        ("cola", "train.tsv", "gj04\t1\t\tA\tB\n", "line 1: expected 4 fields"),
        (
            "stsb",
            "train.tsv",
            "sentence1\tsentence2\tscore\nA\tB\t500\n",
            "line 2: the score is '500', expected a number from 0",
        ),
        ("stsb", "train.tsv", "sentence1\tsentence2\tscore\nA\tB\t-0.1\n", "line 2: the score is '-0.1'"),
        ("sst2", "train.tsv", "sentence\tlabel\rgood\t1\rbad\t0\n", "line 1: a column is called .* control character"),
        ("sst2", "train.tsv", "sentence\tlabel\rgood\t1\r", "its lines end in a carriage return alone"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(file, task, name, content, message):
    path = file(f"{task}/{name}", content)
    with pytest.raises(DataError, match=message):
        read_glue(GLUE[task], path.parent, "train", labelled=True)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such folder. Expected GLUE's MRPC folder"):
        read_glue(GLUE["mrpc"], tmp_path / "nowhere", "train", labelled=True)


def test_tensorflow_datasets_give_the_same_examples(tmp_path):
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict({
        "question": tfds.features.Text(),
        "sentence": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=["entailment", "not_entailment"]),
        "idx": np.int32,
    })  # fmt: skip
    rows = [
        {"question": "Wer?", "sentence": "Bär.", "label": 1, "idx": 4},
        {"question": "a", "sentence": "b", "label": 0, "idx": 5},
    ]
    writer = tfds.core.SequentialWriter(
        tfds.core.DatasetInfo(
            builder=tfds.core.DatasetIdentity(
                name="qnli", version=tfds.core.Version("1.0.0"), data_dir=str(tmp_path), module_name="made_here"
            ),
            features=features,
        ),
        max_examples_per_shard=10,
        file_format="array_record",
    )
    writer.initialize_splits(["train", "validation"])
    writer.add_examples({"train": rows[:1], "validation": rows[1:]})
    writer.close_all()
    folder = next(tmp_path.rglob("dataset_info.json")).parent
    assert texts(read_glue(GLUE["qnli"], folder, "train", labelled=True).examples) == [("Wer?", "Bär.", 1, "4")]
    assert texts(read_glue(GLUE["qnli"], folder, "dev", labelled=True).examples) == [("a", "b", 0, "5")]
    assert [has_split(GLUE["qnli"], folder, split) for split in ("train", "dev", "test")] == [True, True, False]
    info = folder / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"name": "glue", "configName": "wnli"}))
    with pytest.raises(DataError, match="GLUE's data set wnli, expected qnli"):
        read_glue(GLUE["qnli"], folder, "train", labelled=True)


def test_the_real_files(shared):
    counts = {"cola": (8551, 1043), "sst2": (67349, 872), "mrpc": (3668, 408), "stsb": (5749, 1500), "rte": (2490, 277)}
    for name, expected in counts.items():
        found = (
            len(read_glue(GLUE[name], shared / "data/glue", split, labelled=True).examples)
            for split in ("train", "dev")
        )
        assert tuple(found) == expected, name
    assert len(read_glue(GLUE["qnli"], shared / "data/glue", "dev", labelled=True).examples) == 5463


def test_every_task_has_a_place_in_a_submission():
    assert FINETUNED == ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
    assert len({task.submission for task in GLUE.values()}) == 10


# --- tables of one's own ----------------------------------------------------------------------------------------------


def test_tsv_csv_and_json_lines_hold_the_same(file):
    tsv = file("a.tsv", 'body\tstars\nIt is "good", yes\t5\nno\t1\n')
    csv = file("a.csv", 'body,stars\n"It is ""good"", yes",5\nno,1\n')
    jsonl = file("a.jsonl", '{"body": "It is \\"good\\", yes", "stars": 5}\n\n{"body": "no", "stars": 1}\n')
    zipped = file("a.csv.gz", gzip.compress(csv.read_bytes()))
    expected = [('It is "good", yes', None, 1, "0"), ("no", None, 0, "1")]
    for path in (tsv, csv, jsonl, zipped):
        labels = read_labels(path, "stars")
        assert labels == ("1", "5")
        assert texts(read_texts(path, text="body", text_pair=None, label="stars", labels=labels)) == expected


def test_semicolons_and_tabs_separate_fields_where_there_is_no_comma(file):
    for mark in ";\t":
        path = file("a.csv", f'text{mark}label\n"a{mark} b, c"{mark}x\n')
        assert [row.fields for row in read_table(path)] == [{"text": f"a{mark} b, c", "label": "x"}]


def test_columns_without_a_name_may_be_several(file):
    rows = read_table(file("a.csv", ",,text,label\n0,1,x,a\n"))
    assert [row.fields for row in rows] == [{"": "0", "text": "x", "label": "a"}]


def test_a_row_of_empty_fields_is_a_row(file):
    def keys(name: str, content: str) -> list[tuple]:
        return [
            (x.key, x.first) for x in read_texts(file(name, content), text="t", text_pair=None, label=None, labels=())
        ]

    two = [("0", "x"), ("1", ""), ("2", "y")]
    assert keys("a.csv", 't,u\nx,1\n"",\n\ny,2\n') == two
    assert keys("a.tsv", "t\tu\nx\t1\n\t\n\ny\t2\n") == two
    assert keys("a.csv", 't\nx\n""\ny\n') == two
    assert keys("a.tsv", "t\nx\n\ny\n\n\n") == two


@pytest.mark.parametrize("twins", [("1", "1.0"), ("01", "1"), ("+1", "1"), ("1e0", "1")])
def test_two_spellings_of_a_number_are_no_two_labels(file, twins):
    path = file("a.csv", "l\n" + "".join(f"{text}\n" for text in ("a", *twins)))
    with pytest.raises(DataError, match=r"a.csv: the labels .* are the same number"):
        read_labels(path, "l")


def test_labels_that_only_look_like_numbers_are_names(file):
    path = file("a.csv", "l\n--1\n-2\n\u0663\n" + "9" * 5000 + "\n")
    assert read_labels(path, "l") == ("--1", "-2", "9" * 5000, "\u0663")


def test_line_ends_inside_of_quotes_belong_to_the_field(file):
    path = file("a.csv", 'text,label\n"two\nlines",a\nthree\n')
    rows = read_table(path)
    assert next(rows).fields == {"text": "two\nlines", "label": "a"}
    with pytest.raises(DataError, match="line 4: expected 2 fields"):
        next(rows)


def test_whole_numbers_are_sorted_by_value_and_names_by_the_alphabet(file):
    def labels(*values: object) -> tuple[str, ...]:
        return read_labels(file("l.jsonl", "".join(json.dumps({"l": value}) + "\n" for value in values)), "l")

    assert labels(10, 9, 2) == ("2", "9", "10")
    assert labels("10", "9", "no") == ("10", "9", "no")
    assert labels(True, False) == ("false", "true")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "text\tlabel\nx\ta\tmore\n", "line 2: expected 2 fields"),
        ("a.tsv", "text\ttext\nx\ta\n", "line 1: two columns are called 'text'"),
        ("a.tsv", "body\tlabel\nx\ta\n", r"line 2: no column 'text' \(found: body, label\)"),
        ("a.tsv", "text\tlabel\nx\tc\n", r"line 2: the label 'c' is not in the label set \('a', 'b'\)"),
        ("a.csv", 'text,label\n"x,a\n', "line 2: not CSV"),
        ("a.jsonl", '{"text": "x", "label": "a"}\n{"text": "x"}\n', "line 2: no column 'label'"),
        ("a.jsonl", '{"text": 3, "label": "a"}\n', "line 1: column 'text' holds 3, expected text"),
        ("a.jsonl", '{"text": "x", "label": 0.5}\n', "line 1: the label is 0.5, expected"),
        ("a.jsonl", "[]\n", "line 1: expected a JSON object, found a list of 0"),
        ("a.jsonl", "{\n", "line 1: not JSON"),
        ("a.csv", "text,label\nx,a,more\n", "line 2: expected 2 fields"),
        ("a.csv", "text,label\nx,a\ntext,label\ny,b\n", "line 3: the header again"),
        ("a.csv", ",text,label\n0,x\n", "line 2: expected 3 fields"),
        ("a.csv", 'text,label\n"",""\n', "line 2: the label is missing"),
        ("a.tsv", "text\tlabel\n\t\n", "line 2: the label is missing"),
        ("a.tsv", "text\tlabel\nx\ta\0\n", "line 2: the label 'a.x00' has a control character"),
        ("a.csv", "text,label\rx,a\ry,b\n", "not CSV|control character"),
        ("a.tsv", "", "the file is empty"),
        ("a.xml", "", "expected a name that ends in .tsv"),
    ],
)
def test_what_is_wrong_with_a_table(file, name, content, message):
    with pytest.raises(DataError, match=message):
        read_texts(file(name, content), text="text", text_pair=None, label="label", labels=("a", "b"))


@pytest.mark.parametrize(
    "value", ["nan", "inf", "", "good", None, True, "1_000", "\u0663", "9" * 400, "0x1p3", "3,5", "1e999", []]
)
def test_a_regression_target_is_a_finite_number(file, value):
    path = file("a.jsonl", json.dumps({"text": "x", "label": value}) + "\n")
    with pytest.raises(DataError, match=r"line 1: the target is .*expected a finite number"):
        read_texts(path, text="text", text_pair=None, label="label", labels=None)
