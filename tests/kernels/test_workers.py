"""A worker's hang, crash or lost context costs one job alone, and what was answered is on disk."""

import json
import os
import sys
import time

import pytest

from bestiary.kernels.bench.workers import Results, Worker

SERVER = """
import os, sys, time
from bestiary.kernels.bench.workers import serve

class Runtime(Exception):
    pass

class Errors:
    JaxRuntimeError = Runtime

sys.modules["jax"] = type("jax", (), {"errors": Errors})  # importing the real one takes seconds

def work(job):
    print("a library speaks")
    if "raise" in job:
        raise {"value": ValueError, "runtime": Runtime}[job["raise"]]("it broke\\nin a second line")
    if "child" in job:
        if os.fork() == 0:
            time.sleep(100)
    return {"pid": os.getpid(), "got": job["x"]}

serve({"work": work})
"""


@pytest.fixture
def asked(tmp_path):
    with Worker([sys.executable, "-c", SERVER], log=tmp_path / "log", startup=20) as worker:
        yield worker


def test_one_process_answers_job_after_job(asked):
    first, second = (asked.ask({"kind": "work", "x": x}, 5) for x in (1, "two"))
    assert (first["got"], second["got"]) == (1, "two")
    assert first["pid"] == second["pid"]
    assert "a library speaks" in asked.log.read_text()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"plant": "crash"}, "its process ended with SIGKILL"),
        ({"plant": "hang"}, "no answer within 1 s"),
        ({"plant": "sticky"}, "Runtime: INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS (planted)"),
        ({"raise": "runtime"}, "Runtime: it broke"),
        ({"raise": "value"}, "ValueError: it broke"),
        ({"kind": "unknown"}, "KeyError: 'unknown'"),
    ],
)
def test_a_fault_costs_its_own_job_alone(asked, fault, reason):
    before = asked.ask({"kind": "work", "x": 1}, 5)
    assert asked.ask({"kind": "work", "x": 2} | fault, 1)["failed"] == reason
    after = asked.ask({"kind": "work", "x": 3}, 5)
    assert after["got"] == 3
    same_process = fault in ({"raise": "value"}, {"kind": "unknown"})
    assert (before["pid"] == after["pid"]) == same_process


def test_what_a_process_started_ends_with_it(asked):
    answer = asked.ask({"kind": "work", "x": 1, "child": True}, 5)
    group = os.getpgid(answer["pid"])
    asked.stop()
    for _ in range(50):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a process is left")


def test_a_command_that_cannot_start_is_an_answer(tmp_path):
    with Worker([sys.executable, "-c", "import no_such_module"], log=tmp_path / "log", startup=20) as worker:
        assert worker.ask({"kind": "work"}, 5)["failed"] == "its process ended with exit status 1"
    assert "no_such_module" in (tmp_path / "log").read_text()


def test_results_are_read_up_to_where_a_kill_has_cut_them(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    results.add({"name": "a"}, {"x": 1})
    results.add({"name": "b"}, {"x": 2})
    text = results.path.read_text()
    assert [json.loads(line)["answer"]["x"] for line in text.splitlines()] == [1, 2]
    results.path.write_text(text[:-9])
    assert results.read() == [({"name": "a"}, {"x": 1})]
    results.path.write_text(text[:9] + "\n" + text)
    with pytest.raises(ValueError, match=r"results.jsonl, line 1: not JSON"):
        results.read()
