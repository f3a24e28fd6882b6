"""SWAG's and CODAH's official files, and what is wrong with others."""

from pathlib import Path

import pytest

from bestiary.data import DataError
from bestiary.data.tasks.multiple_choice import read_codah, read_swag, split_fold

HEADER = ",video-id,fold-ind,startphrase,sent1,sent2,gold-source,ending0,ending1,ending2,ending3,label\n"
ROW = '0,anetv,3416,"She walks, a dog","She walks, slowly.",a dog,gold,runs.,"says ""no"".",sings.,"is\ngone.",2\n'


def test_swag_has_the_official_columns(file):
    (question,) = read_swag(file("val.csv", HEADER + ROW))
    assert question.pairs == (
        ("She walks, slowly.", "a dog runs."),
        ("She walks, slowly.", 'a dog says "no".'),
        ("She walks, slowly.", "a dog sings."),
        ("She walks, slowly.", "a dog is\ngone."),
    )
    assert (question.key, question.label) == ("0", 2)
    # test.csv has no labels
    bare = file("test.csv", HEADER.replace(",label", "") + ROW.replace(",2\n", "\n"))
    assert read_swag(bare, labelled=False)[0].label is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: no column sent1, sent2, ending0, ending1, ending2, ending3, label; found nothing"),
        (HEADER, "no questions"),
        (HEADER.replace("ending3,label", "gold"), "line 1: no column ending3, label"),
        (HEADER + ROW + "1,x,2\n", "line 4: expected 12 fields (, video-id"),
        (HEADER + ROW.replace(",2\n", ",4\n"), "line 2: expected the right ending's number, 0 to 3, found '4'"),
        (HEADER + '0,"open', "not CSV"),
        (HEADER + ROW.replace(",2\n", ",2,\n"), "line 2: expected 12 fields"),
        (HEADER + ROW.replace(",2\n", ",21,x,y\n"), "line 2: expected 12 fields"),
        (HEADER + ROW + ROW, "line 4: another row before has the number '0' too"),
        (HEADER.replace("fold-ind", "label") + ROW, "line 1: two columns are called 'label'"),
        (HEADER + ",,,,,,,,,,,\n", "expected the right ending's number, 0 to 3, found ''"),
    ],
)
def test_bad_swag_is_refused_with_its_line(file, text, message):
    path = file("train.csv", text)
    with pytest.raises(DataError) as error:
        read_swag(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_codah_takes_quotes_literally(file):
    path = file("full_data.tsv", 'o\tHe said "go\tand" ran.\tup\tdown\t"\t1\n\nq\tIt\ta\tb\tc\td\t0\n')
    first, second = read_codah(path)
    assert first.pairs == tuple(('He said "go', ending) for ending in ('and" ran.', "up", "down", '"'))
    assert (first.label, second.label, second.where) == (1, 0, f"{path}, line 3")
    for text, message in (("o\tIt\ta\tb\t0\n", "expected 7 fields"), ("o\tIt\ta\tb\tc\td\tx\n", "found 'x'")):
        with pytest.raises(DataError, match=f"line 1: .*{message}"):
            read_codah(file("bad.tsv", text))


def test_folds_hold_every_question_out_once(shared: Path):
    questions = read_codah(shared / "data" / "codah" / "full_data.tsv")
    assert len(questions) == 2776
    held = []
    for fold in range(5):
        train, dev = split_fold(questions, fold)
        assert not {q.key for q in train} & {q.key for q in dev}
        assert len(train) + len(dev) == len(questions)
        held += [q.key for q in dev]
    assert sorted(held) == sorted(q.key for q in questions)
    with pytest.raises(DataError, match="--fold is 5"):
        split_fold(questions, 5)
