"""`bestiary report`: one page that holds everything, and lets no text of the data become markup."""

import json
import re
from pathlib import Path

import pytest

from bestiary.train.cli import main


def run_folder(
    folder: Path, *, rate: float = 0.1, loss: float = 2.0, sample: str = "fine", finished: bool = True
) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model": "bert-tiny", "out": str(folder), "optim": {"rate": rate}}))
    lines = [{"step": 10, "loss": 4.0}, {"step": 20, "loss": loss}, {"step": 20, "eval/loss": loss + 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "samples.txt").write_text(f"{sample}\n")
    if finished:
        results = {"held_out": {"loss": loss + 0.5}, "tokens_per_second": 1234.5, "versions": {"jax": "0.0"}}
        (folder / "results.json").write_text(json.dumps(results))
    return folder


def written(tmp_path: Path, *folders: Path) -> str:
    assert main(["report", *map(str, folders), "--out", str(tmp_path / "page.html")]) == 0
    return (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> str:
    tmp_path = tmp_path_factory.mktemp("reports")
    evil = run_folder(tmp_path / "b", rate=0.2, loss=1.0, sample="<script>alert('x')</script> & $x$", finished=False)
    return written(tmp_path, run_folder(tmp_path / "a"), evil)


def test_settings_that_differ_are_apart_from_those_that_do_not(compared: str) -> None:
    differ = compared.partition("Settings that differ")[2].partition("<details>")[0]
    assert "optim.rate" in differ
    assert "model" not in differ
    assert "bert-tiny" in compared


def test_text_of_the_data_is_escaped(compared: str) -> None:
    assert "<script" not in compared
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; $x$" in compared


def test_nothing_is_outside_of_the_page(compared: str) -> None:
    sources = re.findall(r'(?:src|href)="([^"]+)"', compared)
    assert sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)


def test_an_unfinished_run_is_shown_as_one(compared: str) -> None:
    assert "b has not finished" in compared
    assert "a has not finished" not in compared


def test_one_run_has_its_settings_results_speed_and_samples(tmp_path: Path) -> None:
    page = written(tmp_path, run_folder(tmp_path / "one"))
    for shown in ("held_out.loss", ">2.5<", "tokens_per_second", "1,234.5", "versions.jax", "fine", "optim.rate"):
        assert shown in page


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 1
    assert "is not the folder of a run (no config.json)" in capsys.readouterr().err
    assert main(["report"]) == 2
