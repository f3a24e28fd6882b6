"""The real command, killed and started again: the same parameters and the same metrics, bit for bit."""

import json
import os
import shutil
import signal
import time
from pathlib import Path


def assert_same_run(found: Path, expected: Path) -> None:
    assert (found / "metrics.jsonl").read_text() == (expected / "metrics.jsonl").read_text()
    for name in ("model/model.safetensors", "model/config.json", "model/vocab.txt"):
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


def start_and_send(workshop, run: Path, number: int, *, after_step: int, **settings: str) -> tuple[int, float]:
    """Start, send a signal once metrics of `after_step` are there; (exit status, seconds until it ended)."""
    process = workshop.start(*workshop.arguments(**{"out": run, **settings}))
    path = run / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and f'"step": {after_step},' in path.read_text()):
        time.sleep(0.01)
    sent = time.monotonic()
    process.send_signal(number)
    process.communicate(timeout=120)
    return process.returncode, time.monotonic() - sent


def test_killed_at_several_moments(workshop, uninterrupted):
    out = workshop.folder / "killed"
    for step in (4, 16):
        status, _ = start_and_send(workshop, out, signal.SIGKILL, after_step=step)
        assert status == -signal.SIGKILL
    assert "resuming from step" in workshop.pretrain(out)
    assert_same_run(out, uninterrupted)


def test_terminated_saves_and_another_machine_goes_on_from_the_store(workshop, uninterrupted, monkeypatch):
    """Text, cache and run are in a store, all that the machines share; 75 is the status to restart on."""
    store = workshop.folder / "store"
    shutil.copytree(workshop.folder / "corpus", store / "corpus")
    paths = {name: f"file://{store / name}" for name in ("corpus", "cache", "out")}
    monkeypatch.setenv("XDG_CACHE_HOME", str(workshop.folder / "machine-0"))
    mirrored = workshop.folder / "machine-0" / "bestiary" / "mirror" / "file" / str(store / "out").lstrip("/")
    status, seconds = start_and_send(workshop, mirrored, signal.SIGTERM, after_step=4, **paths)
    assert status == 75
    assert seconds < 20
    assert max(int(path.stem) for path in (store / "out" / "checkpoints").glob("*.json")) >= 4
    assert not list((workshop.folder / "store").rglob(".unfinished*"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(workshop.folder / "machine-1"))
    said = workshop.pretrain(**paths)
    assert "resuming from step" in said
    assert f"the model is in file://{store / 'out' / 'model'}" in said
    assert_same_run(store / "out", uninterrupted)
    settings = json.loads((store / "out" / "config.json").read_text())
    assert [settings["corpus"], settings["cache"], settings["out"]] == [[paths["corpus"]], paths["cache"], paths["out"]]
    assert {path.name for path in (store / "cache").iterdir()} == {"tokenised", "tokenizers"}


def test_a_finished_run_started_again_stays_as_it_is(workshop, uninterrupted):
    out = workshop.folder / "finished"
    shutil.copytree(uninterrupted, out)
    workshop.pretrain(out)
    assert_same_run(out, uninterrupted)


def test_damaged_checkpoints_are_reported_and_the_one_before_used(workshop, uninterrupted):
    """The newest is cut short, the one before has a flipped byte, and the one before that no manifest."""
    out = workshop.folder / "damaged"
    shutil.copytree(uninterrupted, out)
    folder = out / "checkpoints"
    whole, *damaged = sorted(int(path.stem) for path in folder.glob("*.json"))
    unlisted, flipped, cut = damaged

    def largest(step: int) -> Path:
        return max((path for path in (folder / str(step)).rglob("*") if path.is_file()), key=lambda x: x.stat().st_size)

    os.truncate(largest(cut), largest(cut).stat().st_size // 2)
    content = bytearray(largest(flipped).read_bytes())
    content[len(content) // 2] ^= 0x10
    largest(flipped).write_bytes(content)
    (folder / f"{unlisted}.json").unlink()
    said = workshop.pretrain(out)
    for step in damaged:
        assert f"checkpoints/{step} is damaged" in said
    assert f"resuming from step {whole}" in said
    assert_same_run(out, uninterrupted)
