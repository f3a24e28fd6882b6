"""The structure of the code, held: which way imports go, no circles, and files and folders of a size to be read."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOMS = ("data", "kernels", "models", "train")
ROOM_IMPORTS = {"train": {"models", "kernels", "data"}, "models": {"kernels", "data"}, "kernels": set(), "data": set()}

# Folders of train/ are jobs. They import what train/ shares, and of another job only this.
JOB_IMPORTS = {
    "translate": {"train.generate"},
    "text2text": {"train.translate", "train.generate", "train.finetune.tasks"},
    "embed": {"train.finetune.tasks"},
    "language_model": {"train.generate", "train.finetune.tasks"},
    "multitask": {"train.images.loss", "train.images.model", "train.images.prediction"},
    "commands": {"train.generate.released"},
    "bench": {"train.pretrain", "train.translate", "train.generate"},
}

MOST_LINES, MOST_MODULES = 600, 16
SHARED = {"adapt", "machine", "optim"}  # folders of train/ that are no job

NAMED_MODULE = re.compile(r"(\.+[a-z_][a-z0-9_.]*)(:\w+)?")  # as import_module takes it: ".hopper.backend", ".a:Name"


def modules(repository: Path) -> dict[str, Path]:
    """Dotted name, without the project's -> file, of all modules; a package is its __init__.py."""
    found = {}
    for room in ROOMS:
        for path in (repository / room).rglob("*.py"):
            parts = path.relative_to(repository).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """What a module imports of the project: anywhere in it, and by names in strings too."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]

    def absolute(level: int, rest: str) -> str:
        above = package[: len(package) - level + 1]
        return ".".join([*above, *filter(None, [rest])])

    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            source = absolute(node.level, node.module or "")
            for alias in node.names:
                submodule = f"{source}.{alias.name}".lstrip(".")
                yield submodule if submodule in known else source
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            match = NAMED_MODULE.fullmatch(node.value)
            if match:
                rest = match[1].lstrip(".")
                named = absolute(len(match[1]) - len(rest), rest)
                if named in known:
                    yield named


@pytest.fixture(scope="module")
def imports(repository) -> dict[str, set[str]]:
    """Module -> the project's modules that it imports."""
    known = modules(repository)
    return {name: set(imported(name, path, known)) - {name} for name, path in known.items()}


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """The circles that a walk through the imports closes, each once."""
    found, done, path = [], set(), []

    def visit(name: str) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            path.append(name)
            for other in sorted(imports.get(name, ())):
                visit(other)
            done.add(path.pop())

    for name in sorted(imports):
        visit(name)
    return found


def test_no_import_goes_in_a_circle(imports):
    assert [" -> ".join(circle) for circle in circles(imports)] == []


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [["a", "b", "c", "a"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_a_module_named_in_a_string_counts_as_imported(tmp_path):
    (tmp_path / "b.py").write_text('TASKS = {"x": (".c", "Task"), "y": "..room.d:Task", "z": ".no.module"}\n')
    known = {"room.b": tmp_path / "b.py", "room.c": tmp_path / "c.py", "room.d": tmp_path / "d.py"}
    assert set(imported("room.b", tmp_path / "b.py", known)) == {"room.c", "room.d"}


def test_rooms_import_one_way(imports):
    """train -> models -> kernels, train -> data; kernels and data know nobody."""
    wrong = [
        f"{name} imports {other}"
        for name, others in imports.items()
        for other in sorted(others)
        if (room := name.split(".")[0]) != (target := other.split(".")[0]) and target not in ROOM_IMPORTS[room]
    ]
    assert wrong == []


def test_jobs_do_not_import_each_other(repository, imports):
    jobs = {path.name for path in (repository / "train").iterdir() if (path / "__init__.py").is_file()} - SHARED
    wrong = []
    for name, others in imports.items():
        _, job, *_ = [*name.split("."), "", ""]
        if not name.startswith("train.") or job not in jobs:
            continue
        for other in sorted(others):
            allowed = {f"train.{job}", *JOB_IMPORTS.get(job, ())}
            to_job = other.startswith("train.") and other.split(".")[1] in jobs
            if to_job and not any(f"{other}.".startswith(f"{some}.") for some in allowed):
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_shared_modules_of_train_import_no_job(repository, imports):
    """But for the command line, which names them all."""
    jobs = {path.name for path in (repository / "train").iterdir() if (path / "__init__.py").is_file()} - SHARED
    wrong = [
        f"{name} imports {other}"
        for name, others in imports.items()
        for other in sorted(others)
        if name.startswith("train.") and name.split(".")[1] not in {*jobs, "cli"}
        if other.startswith("train.") and other.split(".")[1] in jobs
    ]
    assert wrong == []


def test_files_can_be_read_in_one_sitting(repository):
    lengths = {
        str(path.relative_to(repository)): len(path.read_text().splitlines())
        for folder in (*ROOMS, "tests")
        for path in (repository / folder).rglob("*.py")
    }
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_a_folders_listing_is_its_plan(repository):
    counts = {}
    for path in modules(repository).values():
        if path.name != "__init__.py":
            folder = str(path.parent.relative_to(repository))
            counts[folder] = counts.get(folder, 0) + 1
    assert {folder: count for folder, count in counts.items() if count > MOST_MODULES} == {}
