"""The real command, killed and started again: the same parameters and the same metrics, bit for bit."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest


def assert_same_run(found: Path, expected: Path) -> None:
    assert (found / "metrics.jsonl").read_text() == (expected / "metrics.jsonl").read_text()
    for name in ("model/model.safetensors", "model/config.json", "model/vocab.txt"):
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


def start_and_send(workshop, out: Path, number: int, *, after_step: int) -> tuple[int, float]:
    """Start, send a signal once metrics of `after_step` are there; (exit status, seconds until it ended)."""
    process = workshop.start(*workshop.arguments(out))
    path = out / "metrics.jsonl"
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


def test_terminated_saves_and_exits_0(workshop, uninterrupted):
    out = workshop.folder / "terminated"
    status, seconds = start_and_send(workshop, out, signal.SIGTERM, after_step=4)
    assert status == 0
    assert seconds < 20
    assert max(int(path.stem) for path in (out / "checkpoints").glob("*.json")) >= 4
    workshop.pretrain(out)
    assert_same_run(out, uninterrupted)


def test_a_finished_run_started_again_stays_as_it_is(workshop, uninterrupted):
    out = workshop.folder / "finished"
    shutil.copytree(uninterrupted, out)
    workshop.pretrain(out)
    assert_same_run(out, uninterrupted)


@pytest.mark.parametrize("harm", ["cut short", "flipped byte", "no manifest"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(workshop, uninterrupted, harm):
    out = workshop.folder / harm.replace(" ", "-")
    shutil.copytree(uninterrupted, out)
    steps = sorted(int(path.stem) for path in (out / "checkpoints").glob("*.json"))
    newest = out / "checkpoints" / str(steps[-1])
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    if harm == "cut short":
        os.truncate(largest, largest.stat().st_size // 2)
    elif harm == "flipped byte":
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 0x10
        largest.write_bytes(content)
    else:
        (out / "checkpoints" / f"{steps[-1]}.json").unlink()
    said = workshop.pretrain(out)
    assert f"checkpoints/{steps[-1]} is damaged" in said
    assert f"resuming from step {steps[-2]}" in said
    assert_same_run(out, uninterrupted)
