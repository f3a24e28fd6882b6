"""A kernel is chosen by default if it is on record as right, or agrees with plain JAX in another process."""

import dataclasses
import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.kernels import BACKENDS, attention, backends, chip_table, conformance, selfcheck, tuning, xla
from bestiary.kernels.call import Call
from bestiary.kernels.conformance import Case, compare
from bestiary.kernels.tuning import Features, Key


class Kernel:
    """The reference, with a fault."""

    def __init__(self, fault=lambda call, results: results):
        self.fault, self.calls = fault, 0

    def supports(self, call):
        return None

    def run(self, call):
        self.calls += 1
        return self.fault(call, xla.run(call))


@pytest.fixture
def offer(monkeypatch):
    """Puts an unproven kernel before the reference."""
    selfcheck._agrees.cache_clear()

    def put(kernel):
        known = {"new": kernel, "xla": BACKENDS["xla"]}
        monkeypatch.setattr(backends, "BACKENDS", known)
        monkeypatch.setattr(conformance, "BACKENDS", known)
        monkeypatch.setattr(backends, "NEEDS_PROOF", frozenset({"new"}))

    yield put
    selfcheck._agrees.cache_clear()


@pytest.fixture
def arrays():
    return [jnp.asarray(np.random.default_rng(n).normal(size=(1, 8, 2, 8)), jnp.bfloat16) for n in range(3)]


def child(monkeypatch, code):
    """Let a script of this code be the process that compares."""
    monkeypatch.setattr(selfcheck, "COMMAND", (sys.executable, "-c", f"import json, os, sys, time\n{code}"))


def test_taken_where_it_agrees(offer, arrays, monkeypatch, tmp_path):
    kernel = Kernel()
    offer(kernel)
    log = tmp_path / "jobs"
    child(monkeypatch, f"open({str(log)!r}, 'a').write(sys.stdin.read() + '\\n'); print(json.dumps(dict(wrong=[])))")
    jax.jit(attention)(*arrays)  # asked while a program is being traced
    jax.jit(lambda *a: attention(*a, scale=0.5))(*arrays)
    assert kernel.calls == 2
    jax.jit(lambda *a: attention(*a, causal=True))(*arrays)
    jobs = [json.loads(line) for line in log.read_text().splitlines()]
    assert [job["cases"][0]["options"] for job in jobs] == [{}, {"causal": True}]  # once for each kind of call
    assert all(job["implementation"] == "new" and job["dtype"] == "bfloat16" for job in jobs)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print(json.dumps(dict(wrong=['20 x 120: output: an error of 0.3'])))", "output: an error of 0.3"),
        ("os.kill(os.getpid(), 9)", "ended with -9"),
        ("print('an illegal instruction', file=sys.stderr); sys.exit(3)", "ended with 3: an illegal instruction"),
        ("time.sleep(100)", "took more than 1 s"),
    ],
)
def test_left_out_where_it_does_not(offer, arrays, monkeypatch, code, message):
    kernel = Kernel()
    offer(kernel)
    child(monkeypatch, code)
    monkeypatch.setattr(selfcheck, "LIMIT", 1.0 if "sleep" in code else 60.0)
    with pytest.warns(RuntimeWarning, match=message):
        found = attention(*arrays)
    assert kernel.calls == 0
    np.testing.assert_array_equal(found, attention(*arrays, implementation="xla"))


def test_taken_unasked_where_it_is_on_record(offer, arrays, monkeypatch):
    kernel = Kernel()
    offer(kernel)
    child(monkeypatch, "sys.exit(1)")
    features = Features.of(Call.of(query=arrays[0], key=arrays[1], value=arrays[2]))
    monkeypatch.setattr(tuning, "chip", lambda: "h200")
    row = {dataclasses.astuple(features): "2026-12-01"}
    monkeypatch.setitem(chip_table.PROVEN, ("new", "h200", jax.__version__), row)
    attention(*arrays)
    assert kernel.calls == 1
    with pytest.warns(RuntimeWarning, match="ended with 1"):  # another kind of call
        attention(*arrays, causal=True)
    monkeypatch.setitem(chip_table.PROVEN, ("new", "h200", jax.__version__), {})
    monkeypatch.setitem(chip_table.PROVEN, ("new", "h200", "0.0.1"), row)
    with pytest.warns(RuntimeWarning, match="ended with 1"):  # another version of jax
        attention(*arrays)
    assert kernel.calls == 1


def test_what_was_measured_as_faster_is_taken(offer, arrays, monkeypatch):
    kernel = Kernel()
    offer(kernel)
    monkeypatch.setattr(backends, "NEEDS_PROOF", frozenset())
    monkeypatch.setattr(tuning, "chip", lambda: "h200")
    key = Key.of(Call.of(query=arrays[0], key=arrays[1], value=arrays[2]), "h200")
    attention(*arrays)
    assert kernel.calls == 1
    monkeypatch.setitem(chip_table.FASTEST, dataclasses.astuple(key), "xla")
    attention(*arrays)
    assert kernel.calls == 1
    attention(*arrays, causal=True)
    assert kernel.calls == 2


def test_hosts_decide_together(monkeypatch):
    stored = {}
    client = types.SimpleNamespace(
        key_value_set=stored.__setitem__, blocking_key_value_get=lambda key, _limit: stored[key]
    )
    from jax._src import distributed

    monkeypatch.setattr(distributed.global_state, "client", client)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    stored |= {"bestiary/attention/x/1": "yes", "bestiary/attention/x/2": "no"}
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    assert selfcheck._elsewhere("x", True) == [2]
    assert stored["bestiary/attention/x/0"] == "yes"
    assert selfcheck._elsewhere("x", False) == [0, 2]


def test_the_process_that_compares():
    """The real one, on a kind of call that only this test has: two rows too short for the kernels' own lengths."""
    case = {"name": "short", "sizes": (2, 9, 9, 2, 2, 8, 8), "segments": "packed", "options": {"window": (3, 2)}}
    job = {"implementation": "xla", "dtype": "bfloat16", "cases": [case]}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        selfcheck.COMMAND, input=json.dumps(job), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"wrong": []}


KINDS = [
    Features("bfloat16", 64, 64, False, False, "full", "none", False, False),
    Features("float16", 128, 96, True, True, "causal+window+segments", "row", True, True),
    Features("bfloat16", 256, 256, True, False, "window", "dense", False, True),
    Features("bfloat16", 32, 32, False, True, "segments", "none", True, False),
]


@pytest.mark.parametrize("features", KINDS, ids=lambda features: features.mask)
def test_cases_are_of_the_features_that_they_stand_for(features):
    for fields in selfcheck.cases(features):
        case = conformance.case_of(json.loads(json.dumps(fields)))
        small = dataclasses.replace(case, sizes=(1, *case.sizes[1:]))
        assert conformance.features(small, features.dtype) == features


# The comparison itself.


def leaks(call, results):
    """Right in every output but of a few queries."""
    out, lse = results
    return out.at[:, 9:12].multiply(1.2), lse


def wrong_gradient(call, results):
    """The right output, but nothing flows back to the values."""
    return xla.run(dataclasses.replace(call, value=jax.lax.stop_gradient(call.value)))


def empty_rows_send_a_gradient(call, results):
    """A gradient of lse that is not a number comes through."""
    out, lse = results
    return out, lse + 0 * call.query[..., 0].astype(jnp.float32)


def not_finite(call, results):
    out, lse = results
    return out.at[0, 0].set(jnp.nan), lse


CASE = Case("compared", (2, 18, 18, 2, 2, 8, 8), segments="packed")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (leaks, "output: an error of"),
        (wrong_gradient, "value: an error of 1"),
        (empty_rows_send_a_gradient, "query: not finite"),
        (not_finite, "output: not finite"),
    ],
)
def test_faults_are_found(offer, fault, message):
    offer(Kernel(fault))
    assert compare(CASE, "xla", "bfloat16")["wrong"] == []
    wrong = compare(CASE, "new", "bfloat16")["wrong"]
    assert any(line.startswith(message) for line in wrong), wrong


def test_runs_that_differ_are_found():
    same = [np.ones((2, 2), np.float32)] * 5
    other = [*same[:3], np.nextafter(same[3], np.float32(2)), same[4]]
    assert conformance.verdict(same, other, same, same)["wrong"] == ["key: two runs differ"]
