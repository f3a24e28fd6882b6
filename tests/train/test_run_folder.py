"""The run folder: one run at a time works in it, and what it writes is finite and whole."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from bestiary.data.cloud.mirror import mirror
from bestiary.data.errors import DataError
from bestiary.data.files import replacing, temporary
from bestiary.data.json_files import read_object_lines
from bestiary.train import run_folder
from bestiary.train.checkpoint import damage, read_params, write_manifest, write_params
from bestiary.train.config import LoopConfig
from bestiary.train.errors import RunError
from bestiary.train.run_folder import LOCK, RunFolder, panels


@dataclass(frozen=True)
class Settings:
    steps: int = 10
    rate: float = 0.5
    out: Path = Path("run")


def begun(folder: Path, settings: Settings | None = None) -> RunFolder:
    run = RunFolder(folder, settings or Settings(), frozenset({"out"}))
    run.begin()
    return run


def test_a_second_start_is_refused_until_the_first_ends(tmp_path):
    first = begun(tmp_path / "run")
    with pytest.raises(RunError, match=rf"another process works in this folder \(process {os.getpid()} on "):
        begun(tmp_path / "run")
    first.close()
    begun(tmp_path / "run").close()


def test_of_two_new_starts_the_second_to_begin_is_refused(tmp_path):
    first, second = (RunFolder(tmp_path / "run", Settings(), frozenset()) for _ in range(2))
    first.begin()
    with pytest.raises(RunError, match="another process works in this folder"):
        second.begin()
    first.close()
    with pytest.raises(RunError, match=r"another configuration:\n  rate: 0\.5 there, 0\.1 asked for"):
        begun(tmp_path / "run", Settings(rate=0.1))


def test_a_kill_releases_the_lock(tmp_path):
    program = (
        "import fcntl, os, sys, time\n"
        "from pathlib import Path\n"
        "from bestiary.train.lock import Lock\n"
        "lock = Lock(Path(sys.argv[1]))\n"
        "print('locked', flush=True)\n"
        "time.sleep(60)\n"
    )
    (tmp_path / "run").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "run" / LOCK)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(RunError, match=f"process {other.pid} on"):
            begun(tmp_path / "run")
        other.send_signal(signal.SIGSTOP)  # a paused process still holds it
        with pytest.raises(RunError, match=f"process {other.pid} on"):
            begun(tmp_path / "run")
        other.kill()
    begun(tmp_path / "run").close()


def test_a_run_whose_folder_was_replaced_writes_nothing_more(tmp_path):
    first = begun(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(RunError, match="now belongs to nobody: it was removed"):
        first.write_metrics(2, {"loss": 1.0})
    second = begun(tmp_path / "run")
    second.write_metrics(1, {"loss": 3.0})
    with pytest.raises(RunError, match=r"now belongs to process \d+ on"):
        first.finish({})
    assert read_object_lines(tmp_path / "run" / "metrics.jsonl") == [{"step": 1, "loss": 3.0}]
    second.close()
    first.close()


def test_of_several_processes_metrics_are_in_the_store_before_a_manifest(tmp_path, monkeypatch, capsys):
    """And a run that another machine has taken saves no checkpoint, writes no manifest, and shares no file.

    A store that does not answer for a moment is no reason to end.
    """

    def not_now(*_: object, **__: object) -> None:
        raise OSError("503 slow down")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine"))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(run_folder, "in_any_process", lambda flag: flag)
    store = tmp_path / "store"
    run = begun(mirror(f"file://{store}"))
    run.write_metrics(1, {"loss": 3.0})
    run.publish_lines()
    assert read_object_lines(store / "metrics.jsonl") == [{"step": 1, "loss": 3.0}]
    (run.folder / "best.safetensors").write_text("weights")
    run.share("best.safetensors")
    assert (store / "best.safetensors").read_text() == "weights"
    run.before_checkpoint()
    with monkeypatch.context() as patched:
        patched.setattr(LocalFileSystem, "cat_file", not_now)
        run.before_checkpoint()
    assert "whose it is could not be read" in capsys.readouterr().out
    (store / LOCK).write_text("process 2 on another\n")
    for write in (run.before_checkpoint, run.publish_lines, lambda: run.share("best.safetensors"), run.close):
        with pytest.raises(DataError, match="now belongs to process 2 on another"):
            write()


def test_asking_for_more_steps_says_how_to_go_on(tmp_path):
    begun(tmp_path / "run").close()
    with pytest.raises(RunError, match=rf"for longer, give --resume-from {tmp_path / 'run'} and another --out"):
        begun(tmp_path / "run", Settings(steps=20))
    with pytest.raises(RunError) as error:
        begun(tmp_path / "run", Settings(steps=20, rate=0.1))
    assert "--resume-from" not in str(error.value)


def test_a_metric_that_is_not_finite_is_an_error(tmp_path):
    run = begun(tmp_path / "run")
    with pytest.raises(DataError, match=r"run, step 3: eval/mcc is nan"):
        run.write_metrics(3, {"eval/loss": 1.0, "eval/mcc": float("nan")})
    with pytest.raises(DataError, match=r"results\.json: metrics\.dev\.f1 is inf"):
        run.finish({"metrics": {"dev": {"f1": float("inf")}}})
    run.close()


def test_damaged_lines_of_the_metrics_are_left_out_and_counted(tmp_path):
    run = begun(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    good = [f'{{"step": {step}, "loss": 1.0}}\n' for step in (1, 2, 3, 4)]
    path.write_bytes("".join([good[0], '{"step": "2"}\n', "[]\n", *good[1:]]).encode() + b"\xff\n" + b'{"step": 5, "lo')
    speeds = path.with_name("speeds.jsonl")
    speeds.write_text("".join(good) + '{"step": 5, "seco')
    assert run.rewind(3) == [2, 3, 7]
    assert path.read_text() == speeds.read_text() == "".join(good[:3])
    run.close()


MANIFESTS = (
    f'{{"a": [{"9" * 5000}, 1]}}',
    "[]",
    "null",
    "{}",
    '{"a": 5}',
    '{"a": [1]}',
    '{"a": [true, 1]}',
    "[" * 9**6,
)


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_manifest_of_something_else_is_damage(tmp_path, manifest: str):
    (tmp_path / "40").mkdir()
    (tmp_path / "40" / "a").write_text("arrays")
    write_manifest(tmp_path, 40)
    assert damage(tmp_path, 40) is None
    (tmp_path / "40.json").write_text(manifest)
    assert "manifest" in str(damage(tmp_path, 40))


def test_damaged_weights_of_an_evaluation_are_named(tmp_path):
    path = tmp_path / "best.safetensors"
    write_params(path, {"a": {"b": np.arange(6.0, dtype=np.float32)}})
    np.testing.assert_array_equal(read_params(path)["a"]["b"], np.arange(6.0))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    for damaged in (bytes(content), bytes(content[:-3]), b""):
        path.write_bytes(damaged)
        with pytest.raises(RunError, match=r"best\.safetensors: the weights .* are missing or damaged"):
            read_params(path)
    path.unlink()
    with pytest.raises(RunError, match="missing or damaged"):
        read_params(path)


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    mine = temporary(tmp_path / "model").name
    left = tmp_path / mine.replace(str(os.getpid()), str(ended.pid))
    left.mkdir()
    (left / "config.json").touch()
    of_another = tmp_path / mine.replace(str(os.getpid()), str(os.getppid()))
    of_another.mkdir()
    assert temporary(tmp_path / "model").name == mine
    assert list(tmp_path.iterdir()) == [of_another]


def test_what_cannot_be_written_names_the_file_that_was_asked_for(tmp_path):
    for path, said in (
        (tmp_path / "missing" / "x.npy", r"missing/x\.npy: there is no folder .*missing to write to"),
        (tmp_path, "is a folder; expected the name of a file"),
    ):
        with pytest.raises(OSError, match=said), replacing(path):
            pass


def test_settings_that_an_earlier_version_did_not_have_have_their_defaults(tmp_path):
    begun(tmp_path / "run").close()
    path = tmp_path / "run" / "config.json"
    stored = json.loads(path.read_text())
    del stored["rate"]
    path.write_text(json.dumps(stored))
    with pytest.raises(RunError, match=r"another configuration:\n  rate: 0\.5 there, 0\.1 asked for"):
        begun(tmp_path / "run", Settings(rate=0.1))
    begun(tmp_path / "run").close()


def test_what_has_no_value_or_is_always_zero_gets_no_panel():
    records = [
        {"step": 1, "loss": 2.0, "nsp_loss": None, "overflows": 0.0},
        {"step": 2, "eval/loss": 1.5, "overflows": 0.0, "eval/f1": 0.0},
        {"step": 3, "eval/f1": 0.5},
    ]
    assert panels(records) == ["loss", "f1"]
    assert panels([{"step": 1, "loss": 0.0}]) == []


class Recorder:
    """Stands in for wandb or trackio, whose three functions it has."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def init(self, **settings) -> None:
        self.calls.append(("init", settings))

    def log(self, values, step) -> None:
        self.calls.append(("log", step, values))

    def finish(self) -> None:
        self.calls.append(("finish",))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_metrics_go_to_a_tracker_too(tmp_path, monkeypatch, name):
    tracker = Recorder()
    monkeypatch.setitem(sys.modules, name, tracker)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = RunFolder(tmp_path / "run", Settings(), frozenset({"out"}), track=name)
    run.begin()
    run.write_metrics(10, {"loss": 2.0}, {"tokens_per_second": 5.0})
    run.close()
    (_, settings), *rest = tracker.calls
    assert settings["config"]["steps"] == 10
    assert settings["name"] == "run"
    assert settings.get("mode") == ("offline" if name == "wandb" else None)
    assert rest == [("log", 10, {"loss": 2.0, "tokens_per_second": 5.0}), ("finish",)]


def test_a_tracker_that_is_not_installed_is_refused():
    with pytest.raises(RunError, match="--track trackio: trackio is not installed"):
        LoopConfig(track="trackio")
