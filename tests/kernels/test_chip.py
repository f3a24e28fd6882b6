"""One command on a chip, rehearsed on the CPU: faults cost their own case alone, and every result is on disk."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from bestiary.kernels import DenseBias, RelativeBias, chip_table, conformance
from bestiary.kernels.bench import chip
from bestiary.kernels.bench.jobs import timing_case
from bestiary.kernels.bench.peers import NAMES
from bestiary.kernels.bench.workers import Results
from bestiary.kernels.call import Call
from bestiary.kernels.conformance import case_of
from bestiary.kernels.tuning import Features

# Packages that the project has and the chip's machine need not have.
ABSENT = ("tyro", "grain", "tensorflow_datasets", "array_record", "safetensors", "matplotlib", "flax", "optax", "orbax",
          "tokenizers", "sentencepiece", "scipy", "sklearn", "absl", "etils")  # fmt: skip


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Variables of a process, and of those it starts, to which these packages are not there."""
    folder = tmp_path_factory.mktemp("without")
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n")
    return os.environ | {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory, environment, repository):
    """The folder of a rehearsal, and what it printed."""
    out = tmp_path_factory.mktemp("chip") / "out"
    done = subprocess.run(
        [sys.executable, "bench/chip.py", "--out", str(out), "--rehearse", "--budget", "100"],
        cwd=repository, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_faults_cost_their_own_case_alone(rehearsed):
    out, printed = rehearsed
    found = Results(out / "results.jsonl").read()
    failures = {job["name"]: answer["failed"] for job, answer in found if "failed" in answer}
    assert {name: reason.split(":")[0] for name, reason in failures.items() if "no answer" not in reason} == {
        "L=24 causal=True": "its process ended with SIGKILL",
        "L=22": "JaxRuntimeError",
    }
    assert {name for name, reason in failures.items() if "no answer" in reason} == {"L=20", "jax.nn xla"}
    assert not any(answer.get("wrong") for _, answer in found)
    first, smoke = found[:2]
    assert first[1]["versions"]["jax"] == jax.__version__
    assert smoke[0]["name"].startswith("smoke")
    checks = {job["name"]: answer for job, answer in found if job["kind"] == "check"}
    assert set(checks["L=70 bias=relative segments=packed rate=0.1"]["errors"]) == {
        "output", "lse", "query", "key", "value", "bias"
    }  # fmt: skip
    timed = [job["name"] for job, answer in found if "backward" in answer]
    assert sorted(timed) == ["bestiary xla", "bestiary xla", "jax.nn xla"]
    assert "rehearsed: 4 faults planted, 4 jobs failed" in printed


def test_the_table_needs_no_other_package_and_the_chart_matplotlib_alone(rehearsed):
    out, printed = rehearsed
    assert "(no chart: matplotlib is not installed)" in printed
    assert not (out / "chart.png").exists()
    table = (out / "table.md").read_text()
    assert "- L=20: no answer within" in table
    assert "| bestiary xla |" in table
    assert "- jax.nn xla: no answer within" in table


def test_a_report_of_what_a_kill_has_left(rehearsed, tmp_path, capsys):
    lines = (rehearsed[0] / "results.jsonl").read_text()
    timed = lines.index('"kind": "contest"')
    (tmp_path / "results.jsonl").write_text(lines[: timed + 40])
    assert chip.main(["--out", str(tmp_path), "--report"]) == 0
    assert "Right:" in capsys.readouterr().out
    (tmp_path / "results.jsonl").write_text(lines)
    assert chip.main(["--out", str(tmp_path), "--report"]) == 0
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "chip_table.py").exists()  # a CPU proves nothing


def test_ended_from_outside_it_reports_what_it_has(tmp_path, environment, repository):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "bench/chip.py", "--out", str(out), "--rehearse", "--plant", "hang:where", "--budget", "500"],
        cwd=repository, env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    # Its first worker hangs. Both end at once.
    while not (out / "log.txt").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "nothing was measured" in printed


def test_an_earlier_run_is_not_written_over(rehearsed, tmp_path, capsys):
    assert chip.main(["--out", str(rehearsed[0])]) == 2
    assert "expected no results yet, found" in capsys.readouterr().err
    assert chip.main(["--out", str(tmp_path), "--report"]) == 2
    assert "expected results.jsonl, found none there" in capsys.readouterr().err
    assert chip.main(["--out", str(tmp_path), "--plant", "flood:L=1"]) == 2
    assert "expected FAULT:WORDS with one of hang, crash, sticky, found 'flood'" in capsys.readouterr().err


def test_the_record_of_what_was_right_and_fastest(monkeypatch):
    """Kinds of calls with a wrong case are not on record, and leave it; other chips' rows stay."""
    plain = ("bfloat16", 64, 64, False, False, "full", "none", False, False)
    causal = ("bfloat16", 64, 64, False, False, "causal", "none", False, False)
    other = ("tpu", "v5e", "0.11.2")
    key = ("hopper", "h200", "0.11.2")
    monkeypatch.setattr(chip_table, "PROVEN", {other: {plain: "2026-01-01"}, key: {causal: "2026-01-01"}})
    monkeypatch.setattr(chip_table, "FASTEST", {("v5e", "bfloat16", 64, 512, "full", "none", False): "tpu"})
    (job, *_) = chip.contests("gpu", {}, rehearse=False)
    seconds = {name: {"median": 1.0 if name == "cudnn" else 2.0} for name in ("hopper", "cudnn")}
    result = {
        "chip": "h200", "date": "2026-12-01", "versions": {"jax": "0.11.2"},
        "checks": [
            {"name": "a", "features": list(plain), "errors": {}, "wrong": []},
            {"name": "b", "features": list(causal), "errors": {}, "wrong": []},
            {"name": "c", "features": list(causal), "errors": {}, "wrong": ["output: an error"]},
            {"name": "d", "failed": "no answer"},
        ],
        "cases": [job["case"] | {"contestants": [
            *({"name": f"bestiary {name}", "forward": time, "backward": time} for name, time in seconds.items()),
            {"name": "torch flex", "forward": {"median": 0.1}, "backward": {"median": 0.1}},
        ]}],
    }  # fmt: skip
    made = types.ModuleType("made")
    exec(chip.recorded(result), made.__dict__)
    proven, fastest = made.PROVEN, made.FASTEST
    assert proven == {other: {plain: "2026-01-01"}, key: {plain: "2026-12-01"}}
    assert fastest == {
        ("v5e", "bfloat16", 64, 512, "full", "none", False): "tpu",
        ("h200", "bfloat16", 64, 512, "full", "none", False): "cudnn",
    }


class Answering:
    """A worker on a Hopper GPU that is not there: everything is right, but for what is in `wrong`."""

    wrong = "D=256 causal=True"

    def __init__(self, log, environment, *, startup):
        del log, environment, startup

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        pass

    def ask(self, job, seconds):
        assert seconds > 0
        seconds = {"median": 1e-3, "shortest": 1e-3, "longest": 1e-3}
        answer = {
            "where": {"platform_name": "gpu", "chip": "h200", "device": "NVIDIA H200", "versions": {"jax": "0.11.2"}},
            "ceilings": {"operations": 8e14, "bytes": 4e12},
            "contest": {"errors": {}, "forward": seconds, "backward": seconds},
        }.get(job["kind"])
        if answer is None:
            features = conformance.features(case_of(job["case"]), job["dtype"])
            failed = job["name"].endswith(self.wrong)
            answer = {"errors": {}, "wrong": ["lse: two runs differ"] if failed else [], "features": list(features)}
        elif job["name"] == "torch flex":
            answer = {"reason": "is not installed"}
        return json.loads(json.dumps(answer)) | {"seconds": 0.1}


def test_a_whole_run_on_a_chip(monkeypatch, tmp_path, capsys):
    """In its order, and what it then puts on record. The arrays of its cases are not drawn."""
    monkeypatch.setattr(chip, "worker", Answering)
    monkeypatch.setattr(conformance, "features", lambda case, dtype: dataclasses.astuple(features_of(case, dtype)))
    table = tmp_path / "chip_table.py"
    table.write_text(Path(chip_table.__file__).read_text())
    monkeypatch.setattr(chip_table, "__file__", str(table))
    out = tmp_path / "out"
    assert chip.main(["--out", str(out), "--record"]) == 1
    printed = capsys.readouterr().out
    assert "CHECKED: 1 bad of 65: L=700 D=256 causal=True" in printed
    found = Results(out / "results.jsonl").read()
    kinds = [job["kind"] for job, _ in found]
    assert kinds == sorted(kinds, key=["where", "check", "ceilings", "contest"].index)
    (first, *_), (last, *_) = (
        [job["name"] for job, _ in found if job["kind"] == kind] for kind in ("check", "contest")
    )
    assert first == "smoke L=512"
    assert last == "bestiary hopper"
    made = types.ModuleType("made")
    exec(table.read_text(), made.__dict__)
    assert table.read_text() == (out / "chip_table.py").read_text()
    (features,) = made.PROVEN.values()
    assert ("bfloat16", 64, 64, False, False, "segments", "none", False, True) in features
    assert not any(size == 256 and mask == "causal" and not dropout for _, size, *_, mask, _, _, dropout in features)
    assert len(made.FASTEST) == sum(packed is None for *_, packed in chip.TIMES)  # others have but one of ours
    assert set(made.FASTEST.values()) == {"hopper"}
    assert (out / "chart.png").exists()


def test_what_the_time_did_not_reach_is_listed(monkeypatch, tmp_path):
    monkeypatch.setattr(chip, "worker", Answering)
    monkeypatch.setattr(conformance, "features", lambda case, dtype: dataclasses.astuple(features_of(case, dtype)))
    monkeypatch.setattr(Answering, "wrong", "no such case")
    assert chip.main(["--out", str(tmp_path), "--budget", "1"]) == 0
    times = [answer for job, answer in Results(tmp_path / "results.jsonl").read() if job["kind"] == "contest"]
    assert times
    assert all(answer == {"failed": "not reached"} for answer in times)
    assert "- bestiary hopper: not reached" in (tmp_path / "table.md").read_text()


def features_of(case, dtype):
    """What `conformance.features` gives, from shapes alone."""
    b, q_len, k_len, heads, k_heads, size, value_size = case.sizes
    bias = {None: None, "dense": DenseBias(None)}.get(case.bias, RelativeBias(None))
    segments = None if case.segments is None else jnp.ones(1)
    shapes = (b, q_len, heads, size), (b, k_len, k_heads, size), (b, k_len, k_heads, value_size)
    query, key, value = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    options = {"causal": False, "window": (None, None), "softcap": None} | case.options
    return Features.of(
        Call(
            query, key, value, bias, segments, segments, None, options["causal"], options["window"], 1.0,
            options["softcap"], case.rate,
        )
    )  # fmt: skip


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_every_job_can_be_asked_for(platform):
    """Jobs are JSON, their cases can be built, and their contestants are known."""
    for job in [*chip.checks(chip.CHECKS, platform), *chip.suite(platform, rehearse=False)]:
        case = case_of(json.loads(json.dumps(job["case"])))
        assert min(case.sizes) > 0
        assert case.sizes[3] % case.sizes[4] == 0
    for job in chip.contests(platform, {}, rehearse=False):
        timing_case(json.loads(json.dumps(job["case"])))
        assert job["name"] in (*NAMES, *(f"bestiary {name}" for name in ("hopper", "tpu", "cudnn", "xla")))
