"""What is reported of a step that hangs, and of processes that disagree."""

import re
import time

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from bestiary.train.errors import RunError
from bestiary.train.machine import watchdog as watchdogs
from bestiary.train.machine.agreement import require_agreement
from bestiary.train.machine.watchdog import Watchdog


def a_step_that_hangs(seconds: float) -> None:
    time.sleep(seconds)


def test_a_step_that_hangs_is_reported_once_with_its_stacks(tmp_path):
    said: list[str] = []
    with Watchdog(0.2, said.append, tmp_path) as watchdog:
        watchdog.ended(6)
        a_step_that_hangs(0.9)
    assert len(said) == 1
    assert re.match("step 7 has not ended for [01] s in process 0 of 1 on ", said[0])
    assert "a_step_that_hangs" in (tmp_path / "hang-step-7-process-0.txt").read_text()


def test_steps_that_end_are_not_reported(tmp_path):
    said: list[str] = []
    with Watchdog(0.6, said.append, tmp_path) as watchdog:
        for step in range(8):
            watchdog.ended(step)
            time.sleep(0.1)
    assert said == []


def test_the_store_of_the_processes_may_be_gone(tmp_path, monkeypatch):
    """It is process 0's. Those that wait for it still report."""

    class Gone:
        def key_value_set(self, *_, **__):
            raise jax.errors.JaxRuntimeError("UNAVAILABLE")

        key_value_dir_get = key_value_set

    monkeypatch.setattr(watchdogs, "_client", Gone)
    said: list[str] = []
    with Watchdog(0.2, said.append, tmp_path) as watchdog:
        watchdog.ended(6)
        time.sleep(0.9)
    assert len(said) == 1
    assert "; process 0 does not answer; the stacks" in said[0]


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"seed": 0, "optim.beta1": 0.9}, None),
        (
            {"seed": 0, "optim.beta1": 0.8},
            "The settings differ between the processes: optim.beta1, in process 1 from process 0",
        ),
        ({"seed": 0, "optim.beta3": 0.9}, "The settings differ: processes 1 have others than process 0"),
    ],
)
def test_processes_that_disagree_are_named(monkeypatch, theirs, message):
    """Two processes, of which the other is made up: what it would send is what it computes of its own values."""
    mine = {"seed": 0, "optim.beta1": 0.9}
    sent: dict[str, list[np.ndarray]] = {"mine": [], "theirs": []}

    def gather(who: str):
        def record(array: np.ndarray) -> np.ndarray:
            sent[who].append(array)
            others = sent["theirs"]
            other = others[len(sent[who]) - 1] if who == "mine" and len(others) >= len(sent[who]) else array
            return np.stack([array, other])

        return record

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather("theirs"))
    require_agreement("The settings", theirs)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather("mine"))
    if message is None:
        require_agreement("The settings", mine)
    else:
        with pytest.raises(RunError, match=message):
            require_agreement("The settings", mine)
